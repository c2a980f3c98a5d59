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
    assert f"Written to {out}: result.json, result.png, training.png\n" in process.stdout


def test_progress_is_printed_where_there_is_no_terminal(finished):
    process, _ = finished
    assert re.search(r"epoch 1/1: loss \d\.\d+, accuracy \d+\.\d %, \d+\.\d s\n", process.stdout)
    told = r"step 5/5: top-1 dense fp32 \d+\.\d %, dense best \d.*qsparseprop \d+\.\d %, \d+ s\n"
    assert re.search(told, process.stdout)
    assert "\r" not in process.stdout + process.stderr


def test_finetune_writes_the_result(finished):
    process, out = finished
    assert process.returncode == 0, process.stderr
    assert sorted(path.name for path in out.iterdir()) == ["result.json", "result.png", "training.png"]
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
    for picture in ("result.png", "training.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_prints_one_line_and_leaves_nothing(tmp_path):
    _needs_the_extra()
    out = tmp_path / "out"
    command = [sys.executable, "-m", "qsparseprop", *TINY, "--out", str(out)]
    # Like a terminal, which signals the whole process group.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        for line in process.stdout:
            if line.startswith("Fine-tuning for "):
                os.killpg(process.pid, signal.SIGINT)
        errors = process.stderr.read()
        assert process.wait(timeout=60) == 130
    assert errors.split() == ["interrupted"]
    assert not out.exists()


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
        (["finetune", "--sparsity", "0"], "--sparsity 0 trains a dense network and goes with --scheme dense only"),
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


def test_a_batch_larger_than_the_data_is_explained(tmp_path, monkeypatch, capsys):
    _needs_the_extra()
    monkeypatch.chdir(tmp_path)
    assert "at most the number of training images, 1437" in _error_of(["finetune", "--batch-size", "1438"], capsys)
    assert list(tmp_path.iterdir()) == []


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
        "import qsparseprop, qsparseprop.cli, qsparseprop.benchmarking.compare\n"
        "import qsparseprop.benchmarking.compare_report, qsparseprop.training.data\n"
        "loaded = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(loaded & {'sklearn', 'tqdm', 'matplotlib'}))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert process.stdout.strip() == "[]"


def test_the_program_shows_something_before_it_imports_torch():
    code = "import sys; sys.argv, sys.orig_argv = ['-m'], ['python', '-m', 'qsparseprop']; import qsparseprop.cli\n"
    code += "before = 'torch' in sys.modules; print(before, qsparseprop.QuantConfig.__name__, 'torch' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert process.stdout.split() == ["False", "QuantConfig", "True"]
    # everybody else has the operators at once: exported programs need them
    code = "import qsparseprop, torch; print(torch.ops.qsparseprop.quantize)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert process.stdout.strip() == "qsparseprop.quantize"


def _made_up_result(mean_to_median_step):
    run = {"top1": 95.0, "saved_mb": 12.3, "peak_rss_mb": 400.0, "config": "fp32 contiguous", "peak_rss_of": "training"}
    run |= {"losses": [2.0, 1.0], "step_s": [0.2, 0.1], "timed_steps": 1, "mean_to_median_step": mean_to_median_step}
    run |= {"replaced_layers": ["conv"], "setup_s": 1.0, "rss_before_training_mb": 300.0}
    run |= {"evaluations": [{"train_s": 0.0, "top1": 9.0}, {"train_s": 0.3, "top1": 95.0}]}
    times = {"dense_fp32": 400.0, "dense_best": 200.0, "qsparseprop": 100.0}
    return {
        "sparsity": 0.9,
        "config": {"model": "resnet18", "batch_size": 64, "threads": 1},
        "environment": {"cpu": "Some Processor with a Name of Usual Length @ 2.40GHz", "threads": 2, "torch": "2.13.0",
                        "qsparseprop": "0.1.0", "date": "2026-11-29T00:00:00+00:00"},
        "runs": {name: run | {"step_ms": step_ms} for name, step_ms in times.items()},
    }  # fmt: skip


@pytest.mark.parametrize(("ratio", "warned"), [(1.05, False), (2.0, True)])
def test_a_busy_machine_is_told_of(ratio, warned, tmp_path):
    from qsparseprop.benchmarking.compare_report import format_table, write_plot

    table = format_table(_made_up_result(ratio))
    assert ("busy" in table) == warned
    (ours,) = [line for line in table.splitlines() if line.startswith("qsparseprop")]
    assert ours.split()[-2:] == ["4.00x", "2.00x"]
    pytest.importorskip("matplotlib")
    write_plot(_made_up_result(ratio), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_keep_their_captions_inside_and_apart(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from qsparseprop.benchmarking.compare import RUN_LABELS
    from qsparseprop.benchmarking.compare_report import write_plot, write_results

    def check(figure, *args, **kwargs):
        figure.draw_without_rendering()
        width, height = figure.bbox.size
        assert width <= 800
        texts = [figure._suptitle, figure._supxlabel]
        for axes in figure.axes:
            names = [tick for tick in axes.get_yticklabels() if tick.get_text().split("\n")[0] in RUN_LABELS.values()]
            axis = [axes.xaxis.label] if axes.xaxis.get_visible() else []
            texts += [*axis, axes.yaxis.label, axes.title, axes._left_title, *names, *axes.texts]
        texts = [text for text in texts if text is not None and text.get_text() and text.get_visible()]
        assert len(texts) > 4
        boxes = [text.get_window_extent() for text in texts]
        for box in boxes:
            assert 0 <= box.x0 < box.x1 <= width
            assert 0 <= box.y0 < box.y1 <= height
        for index, box in enumerate(boxes):
            for other, text in zip(boxes[index + 1 :], texts[index + 1 :], strict=True):
                assert not box.overlaps(other), (texts[index].get_text(), text.get_text())
        saved(figure, *args, **kwargs)

    saved = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", check)
    for names in (list(RUN_LABELS), ["dense_fp32", "dense_best", "qsparseprop"]):
        result = _made_up_result(2.0)
        run = next(iter(result["runs"].values())) | {"step_ms": 54_321.0, "saved_mb": 3000.9}
        result["runs"] = {name: run | {"config": "bf16 channels_last"} for name in names}
        write_results(result, tmp_path)
        for place, of_run in enumerate(result["runs"].values()):  # they may as well take different times
            of_run["evaluations"] = [{"train_s": 0.0, "top1": 9.0}, {"train_s": 100.0 / 1.5**place, "top1": 95.0}]
        write_plot(result, tmp_path / "plot.png")


@pytest.fixture
def without_work(tmp_path, monkeypatch):
    """The command in a folder of its own, with a result that took no work."""
    _needs_the_extra()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qsparseprop.benchmarking.compare.compare", lambda config, reporter: _made_up_result(1.0))
    return tmp_path / "qsparseprop-finetune"


def test_results_go_to_a_folder_that_is_named_and_replace_those_of_another_comparison_only(without_work, capsys):
    assert main(["finetune"]) == 0
    printed = capsys.readouterr().out
    assert "Written to qsparseprop-finetune: result.json, result.png, training.png\n" in printed
    (without_work / "notes.txt").write_text("mine")
    (without_work / "result.png").write_text("older")
    assert main(["finetune"]) == 0
    assert "in place of an older comparison" in capsys.readouterr().out
    assert (without_work / "result.png").read_bytes().startswith(b"\x89PNG")
    assert (without_work / "notes.txt").read_text() == "mine"
    assert main(["finetune", "--quiet", "--out", "other"]) == 0
    assert capsys.readouterr().out.startswith("run ")
    assert (without_work.parent / "other" / "training.png").exists()


@pytest.mark.parametrize(("name", "content", "complaint"), [
    ("result.json", "{}", "result.json is not the result of a comparison"),
    ("result.json", "no json", "result.json is not the result of a comparison"),
    ("result.json", '{"runs": [], "environment": {}}', "result.json is not the result of a comparison"),
    ("training.png", "a picture", "training.png is not the result of a comparison"),
    ("run.json", "{}", "holds a single training"),
])  # fmt: skip
def test_what_is_no_comparison_is_not_overwritten(name, content, complaint, without_work, capsys):
    without_work.mkdir()
    (without_work / name).write_text(content)
    error = _error_of(["finetune", "--quiet"], capsys)
    assert complaint in error
    assert "(--out)" in error
    assert error.count("\n") == 1
    assert {path.name: path.read_text() for path in without_work.iterdir()} == {name: content}


def test_one_run_where_plain_fp32_is_the_best_dense_one(monkeypatch):
    from qsparseprop.benchmarking import compare as module
    from qsparseprop.benchmarking.dense_modes import DENSE_MODES

    pytest.importorskip("sklearn")
    seconds = {mode.name: float(place + 1) for place, mode in enumerate(DENSE_MODES)}
    monkeypatch.setattr(module, "time_dense_modes", lambda *args: seconds)
    started = []

    def finetune_all(specs, *args):
        started.extend(specs)
        return {name: {"step_ms": 2.0, "evaluations": [{"step": 1}]} for name in specs}

    monkeypatch.setattr(module, "_finetune_all", finetune_all)
    config = module.CompareConfig(model="resnet20", width=4, batch_size=64, max_images=64, threads=1)
    result = module.compare(config)
    assert started == ["dense_fp32", "qsparseprop"]
    assert list(result["runs"]) == ["dense_fp32", "dense_best", "qsparseprop"]
    assert [len(run["evaluations"]) for run in result["runs"].values()] == [2, 2, 2]
    assert result["runs"]["dense_best"]["config"] == "fp32 contiguous"


def test_files_appear_whole_or_not_at_all(tmp_path):
    from qsparseprop.benchmarking.compare_report import write_json

    path = tmp_path / "result.json"
    write_json({"peak": float("nan"), "losses": [1.5, float("nan")]}, path)
    assert json.loads(path.read_text()) == {"peak": None, "losses": [1.5, None]}
    with pytest.raises(TypeError):
        write_json({"bad": object()}, path)
    assert json.loads(path.read_text())["losses"] == [1.5, None]
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]
