import json
import os
import re
import signal
import subprocess
import sys

import pytest

from qsparseprop.cli import main

# The smallest network and a large batch: a few seconds, most of them spent in starting processes.
TINY = ["finetune", "--model", "resnet20", "--width", "4", "--threads", "1", "--batch-size", "250"]


def _needs_the_extra():
    for module in ("sklearn", "tqdm", "matplotlib"):
        pytest.importorskip(module)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run in a process of its own, with its output and its directory."""
    _needs_the_extra()
    out = tmp_path_factory.mktemp("finetune") / "deep" / "er"
    command = [sys.executable, "-m", "qsparseprop", *TINY, "--epochs", "1", "--sparsity", "0.8", "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False), out


def test_finetune_succeeds_and_prints_the_table(finished):
    process, out = finished
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    lines = process.stdout.splitlines()
    (header,) = [index for index, line in enumerate(lines) if line.startswith("run ")]
    assert [line.split(" (")[0] for line in lines[header + 2 : header + 5]] == [
        "dense fp32",
        "dense best",
        "qsparseprop",
    ]
    assert {len(line) for line in lines[header : header + 5]} == {len(lines[header])}
    assert str(out / "result.json") in process.stdout


def test_progress_is_printed_where_there_is_no_terminal(finished):
    process, _ = finished
    assert re.search(r"epoch 1/1: loss \d\.\d+, accuracy \d+\.\d %, \d+\.\d s\n", process.stdout)
    told = r"step 5/5: top-1 dense fp32 \d+\.\d %, dense best \d.*qsparseprop \d+\.\d %, \d+ s\n"
    assert re.search(told, process.stdout)
    assert "\r" not in process.stdout + process.stderr


def test_finetune_writes_the_result(finished):
    process, out = finished
    assert process.returncode == 0, process.stderr
    assert sorted(path.name for path in out.iterdir()) == ["result.json", "result.png"]
    result = json.loads((out / "result.json").read_text())
    assert result["sparsity"] == 0.8
    assert list(result["runs"]) == ["dense_fp32", "dense_best", "qsparseprop"]
    for run in result["runs"].values():
        assert len(run["losses"]) == len(run["step_s"]) == 1437 // 250
        assert 0 <= run["top1"] <= 100
        assert run["step_ms"] > 0
        assert run["saved_mb"] > 0
        assert [evaluation["step"] for evaluation in run["evaluations"]] == [0, 5]
    fp32, best, ours = (result["runs"][name] for name in ("dense_fp32", "dense_best", "qsparseprop"))
    assert result["speedup_vs_dense_fp32"] == pytest.approx(fp32["step_ms"] / ours["step_ms"])
    assert result["speedup_vs_dense_best"] == pytest.approx(best["step_ms"] / ours["step_ms"])
    assert best["config"] in result["dense_modes_step_ms"]
    # Nobody has trained yet in the first step: the runs start from the same point with the same batch.
    assert ours["losses"][0] == pytest.approx(fp32["losses"][0], rel=0.1)
    assert best["losses"][0] == pytest.approx(fp32["losses"][0], rel=0.1)
    assert len(result["layer_sparsity"]) == 18
    assert result["environment"]["threads"] == 1
    assert result["config"]["seed"] == 0
    assert (out / "result.png").read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_prints_one_line_and_leaves_nothing(tmp_path):
    _needs_the_extra()
    out = tmp_path / "out"
    command = [sys.executable, "-m", "qsparseprop", *TINY, "--out", str(out)]
    # Like a terminal, which signals the whole process group.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        for line in process.stdout:
            if line.startswith("Starting 3 runs"):
                os.killpg(process.pid, signal.SIGINT)
        errors = process.stderr.read()
        assert process.wait(timeout=60) == 130
    assert errors.split() == ["interrupted"]
    assert list(out.iterdir()) == []


def test_info_shows_the_configuration(capsys):
    assert main(["info"]) == 0
    assert capsys.readouterr().out.strip() not in ("", "None")


def _error_of(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "COMMAND"),
        (["dance"], "dance"),
        (["finetune", "--sparsity", "1"], "--sparsity: must lie between 0 and 1"),
        (["finetune", "--sparsity", "0"], "--sparsity: must lie between 0 and 1"),
        (["finetune", "--sparsity", "nan"], "--sparsity: must lie between 0 and 1"),
        (["finetune", "--sparsity", "many"], "--sparsity: 'many' is not a number"),
        (["finetune", "--epochs", "0"], "--epochs: must be at least 1"),
        (["finetune", "--epochs", "1.5"], "--epochs: '1.5' is not a whole number"),
        (["finetune", "--batch-size", "-3"], "--batch-size: must be at least 1"),
        (["finetune", "--threads", "0"], "--threads: must be at least 1"),
        (["finetune", "--seed", "-1"], "--seed: must be at least 0"),
        (["finetune", "--threads", "100000"], "--threads: must be at most 1024"),
        (["finetune", "--seed", "99999999999"], "--seed: must be at most"),
        (["finetune", "--nonsense"], "--nonsense"),
        (["info", "--nonsense"], "--nonsense"),
        (["bench", "--by-layer"], "needs --model"),
        (["finetune", "--model", "vgg"], "--model: invalid choice"),
        (["finetune", "--scope", "row"], "--scope: invalid choice"),
    ],
)
def test_wrong_arguments_are_explained_in_one_line(arguments, complaint, capsys):
    error = _error_of(arguments, capsys)
    assert complaint in error
    assert error.startswith("python -m qsparseprop")
    assert error.count("\n") == 1
    assert "usage" not in error


def test_a_batch_larger_than_the_data_is_explained(capsys):
    _needs_the_extra()
    assert "at most the number of training images, 1437" in _error_of(["finetune", "--batch-size", "1438"], capsys)


def test_an_output_that_is_no_directory_is_explained(tmp_path, capsys):
    _needs_the_extra()
    path = tmp_path / "file"
    path.write_text("mine")
    assert "--out: cannot make the directory" in _error_of(["finetune", "--out", str(path)], capsys)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("module", "package"), [("sklearn", "scikit-learn"), ("tqdm", "tqdm"), ("matplotlib", "matplotlib")]
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(module, package, tmp_path, monkeypatch, capsys):
    _needs_the_extra()
    monkeypatch.setitem(sys.modules, module, None)
    error = _error_of(["finetune", "--out", str(tmp_path)], capsys)
    assert f"needs {package}," in error
    assert 'pip install "qsparseprop[finetune]"' in error
    assert error.count("\n") == 1


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in ("--sparsity", "--epochs", "--batch-size", "--threads", "--seed", "--out", "--quiet", "exit codes"):
        assert option in text


def test_importing_the_package_loads_no_optional_dependency():
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import qsparseprop, qsparseprop.cli, qsparseprop.utils.compare, qsparseprop.utils.compare_report\n"
        "import qsparseprop.utils.data\n"
        "loaded = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(loaded & {'sklearn', 'tqdm', 'matplotlib'}))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert process.stdout.strip() == "[]"


def _made_up_result(mean_to_median_step):
    run = {"top1": 95.0, "saved_mb": 12.3, "peak_rss_mb": 400.0, "config": "fp32 contiguous", "peak_rss_of": "training"}
    run |= {"losses": [2.0, 1.0], "step_s": [0.2, 0.1], "timed_steps": 1, "mean_to_median_step": mean_to_median_step}
    run |= {"replaced_layers": ["conv"], "setup_s": 1.0, "evaluations": [{"train_s": 0.3, "top1": 95.0}]}
    times = {"dense_fp32": 400.0, "dense_best": 200.0, "qsparseprop": 100.0}
    return {
        "sparsity": 0.9,
        "config": {"model": "resnet18", "batch_size": 64, "threads": 1},
        "runs": {name: run | {"step_ms": step_ms} for name, step_ms in times.items()},
    }


@pytest.mark.parametrize(("ratio", "warned"), [(1.05, False), (2.0, True)])
def test_a_busy_machine_is_told_of(ratio, warned, tmp_path):
    from qsparseprop.utils.compare_report import format_table, write_plot

    table = format_table(_made_up_result(ratio))
    assert ("busy" in table) == warned
    (ours,) = [line for line in table.splitlines() if line.startswith("qsparseprop")]
    assert ours.split()[-2:] == ["4.00x", "2.00x"]
    pytest.importorskip("matplotlib")
    write_plot(_made_up_result(ratio), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_keep_their_captions_inside(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from qsparseprop.utils.compare import RUN_LABELS
    from qsparseprop.utils.compare_report import write_bars, write_plot

    def check(figure, *args, **kwargs):
        figure.draw_without_rendering()
        width, height = figure.bbox.size
        texts = [text for legend in figure.legends for text in legend.get_texts()]
        for axes in figure.axes:
            names = [tick for tick in axes.get_yticklabels() if tick.get_text() in RUN_LABELS.values()]
            texts += [axes.xaxis.label, axes.yaxis.label, *names, *axes.texts]
        assert len(texts) > 4
        for box in (text.get_window_extent() for text in texts if text.get_text()):
            assert 0 <= box.x0 < box.x1 <= width
            assert 0 <= box.y0 < box.y1 <= height
        saved(figure, *args, **kwargs)

    saved = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", check)
    result = _made_up_result(1.0)
    run = next(iter(result["runs"].values())) | {"step_ms": 54_321.0}
    result["runs"] = {name: run | {"config": "bf16 channels_last"} for name in RUN_LABELS}
    write_plot(result, tmp_path / "plot.png")
    bars = {name: {"step_ms": 12_345.6, "saved_mb": 300.9, "added_mb": 679.0} for name in RUN_LABELS}
    write_bars(bars, "title", tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_files_appear_whole_or_not_at_all(tmp_path):
    from qsparseprop.utils.compare_report import write_json

    path = tmp_path / "result.json"
    write_json({"peak": float("nan"), "losses": [1.5, float("nan")]}, path)
    assert json.loads(path.read_text()) == {"peak": None, "losses": [1.5, None]}
    with pytest.raises(TypeError):
        write_json({"bad": object()}, path)
    assert json.loads(path.read_text())["losses"] == [1.5, None]
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]
