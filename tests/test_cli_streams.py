"""Where commands print to: outputs that are closed, or have not all characters."""

import os
import subprocess
import sys

import pytest

from .test_data_found import folder

pytestmark = pytest.mark.skipif(os.name != "posix", reason="shells, and names that are any bytes")


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_outputs_may_be_closed(closed, tmp_path):
    report = tmp_path / "report"
    code = "import sys; from qsparseprop.cli import main; open(sys.argv[1], 'w').write(str(main(['info'])))"
    subprocess.run(["sh", "-c", f'exec "$0" "$@" {closed}', sys.executable, "-c", code, report], check=True)
    assert report.read_text() == "0"


def _unread():
    """A pipe whose reader has gone, as ``| head`` has after ten lines."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def _lost_terminal():
    terminal = pytest.importorskip("pty")
    try:
        master, writer = terminal.openpty()
    except OSError:
        pytest.skip("needs terminals")
    return master, writer


@pytest.mark.parametrize("unbuffered", [(), ("-u",)])
def test_an_output_that_nobody_reads_fails_no_command(unbuffered):
    writer = _unread()
    done = subprocess.run([sys.executable, *unbuffered, "-m", "qsparseprop", "info"], stdout=writer,
                          stderr=subprocess.PIPE, text=True, check=False)  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("output", ["pipe", "terminal"])
@pytest.mark.parametrize("compare", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_an_output_that_nobody_reads_ends_no_training(output, compare, tmp_path):
    data = folder(tmp_path / "images")
    terminal, writer = (None, _unread()) if output == "pipe" else _lost_terminal()
    command = [sys.executable, "-m", "qsparseprop", "finetune", "--data", data, "--model", "mlp", "--width", "8",
               "--image-size", "8", "--batch-size", "8", "--threads", "1", "--out", tmp_path / "run"]  # fmt: skip
    command.append("--compare" if compare else "--no-compare")
    with subprocess.Popen(command, stdout=writer, stderr=writer) as process:
        os.close(writer)
        if terminal is not None:
            os.close(terminal)
        assert process.wait() == 0
    assert (tmp_path / "run" / "result.json").exists()


def test_a_full_disk_behind_the_output_is_told(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-u", "-m", "qsparseprop", "info"], stdout=full, stderr=subprocess.PIPE,
                              text=True, check=False)  # fmt: skip
    assert done.returncode == 1
    assert "No space left on device" in done.stderr


def test_a_swap_tells_nobody_where_there_is_no_output():
    code = ("import sys; sys.stdout = sys.stderr = None\n"
            "import torch\n"
            "from qsparseprop import Finetuner, swap_modules_with_sparse\n"
            "layer = torch.nn.Linear(8, 4); torch.nn.init.zeros_(layer.weight)\n"
            "model = swap_modules_with_sparse(torch.nn.Sequential(layer), None, include_dense=False)\n"
            "batches = [(torch.ones(4, 8), torch.zeros(4, dtype=torch.long))]\n"
            "Finetuner(model, torch.optim.SGD(model.parameters(), lr=0.1)).fit(batches, 1)\n")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_that_the_output_has_no_characters_for_are_printed_all_the_same(tmp_path):
    names = ("\u00c4pfel", os.fsdecode(b"gr\xfcn"))  # the second is no UTF-8, as names from old archives are
    try:
        data = folder(tmp_path / "Fotos \u00fc", names)
    except (OSError, UnicodeError):
        pytest.skip("needs such names")
    (data / names[1] / os.fsdecode(b"\xe4.txt")).write_text("x")  # a file that is passed over is named
    out = tmp_path / os.fsdecode(b"Lauf \xfc")
    command = [sys.executable, "-m", "qsparseprop", "finetune", "--no-compare", "--data", data, "--model", "mlp",
               "--width", "8", "--image-size", "8", "--batch-size", "8", "--threads", "1", "--out", out]  # fmt: skip
    for encoding in "ascii", "utf-8":
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run(command, capture_output=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        assert rb"Lauf \udcfc" in done.stdout
        assert rb"passed over, gr\udcfcn/\udce4.txt" in done.stderr
        command[-1] = tmp_path / os.fsdecode(b"again \xfc Lauf \xfc")
    frozen = subprocess.run([*command[:3], "freeze", out / "best.pt", "--out", tmp_path / "m.qsp"], capture_output=True,
                            env=environment, check=False)  # fmt: skip
    assert frozen.returncode == 0, frozen.stderr
