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
