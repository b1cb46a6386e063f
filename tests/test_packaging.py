"""A wheel holds every module, and works beside packages and folders of the same names."""

import subprocess
import sys
import zipfile

import pytest

from tests.helpers import CHECKOUT, python


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # built from a copy, so that no build folder is left in the checkout
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=CHECKOUT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    for name in tracked:
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (CHECKOUT / name).is_file():
            target.write_bytes((CHECKOUT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--wheel-dir", folder, folder / "source"],
        check=True,
    )  # fmt: skip
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_module(wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    wanted = {f"gaugeblock/{p.name}" for p in (CHECKOUT / "gaugeblock").glob("*.py")}
    for room in ("reference", "kernels", "gpt", "benchmarks"):
        wanted |= {
            f"gaugeblock/{p.relative_to(CHECKOUT).as_posix()}"
            for p in (CHECKOUT / room).rglob("*.py")
        }
    assert packed == wanted


def test_the_wheel_works_beside_namesakes(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    # the user's own folder, and Hugging Face's package of kernels, have our rooms' names
    (tmp_path / "reference.py").write_text("raise RuntimeError('the wrong reference')")
    for folder in (tmp_path / "kernels", site / "kernels"):
        folder.mkdir()
        (folder / "__init__.py").write_text("")
    script = (
        "import gaugeblock, pathlib, transformers\n"
        "from transformers import GPT2LMHeadModel\n"
        "from gaugeblock.reference import GPT, attention\n"
        "from gaugeblock.kernels import attention as kernel\n"
        "from gaugeblock import gpt, benchmarks\n"
        "import gaugeblock.reference as r, gaugeblock.kernels as k\n"
        f"site = pathlib.Path({str(site)!r})\n"
        "assert pathlib.Path(gaugeblock.__file__).is_relative_to(site), gaugeblock.__file__\n"
        "assert pathlib.Path(r.__file__).is_relative_to(site / 'gaugeblock'), r.__file__\n"
        "assert pathlib.Path(k.__file__).is_relative_to(site / 'gaugeblock'), k.__file__\n"
    )
    ran = python("-c", script, cwd=tmp_path, PYTHONPATH=str(site))
    assert ran.returncode == 0, ran.stderr


def test_transformers_is_not_disturbed_by_the_checkout_as_working_folder():
    script = (
        "import sys, kernels\n"
        "assert 'torch' not in sys.modules and 'triton' not in sys.modules\n"
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=11, n_positions=8,"
        " bos_token_id=None, eos_token_id=None))\n"
    )
    ran = python("-c", script)
    assert ran.returncode == 0, ran.stderr


def test_the_reference_needs_no_torch():
    script = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['triton'] = None\n"
        "import numpy as np\n"
        "from gaugeblock.reference import layer_norm, layer_norm_backward\n"
        "from gaugeblock.reference.oracle import check\n"
        "ours = lambda *a, **o: layer_norm(*a, **o)[0]\n"
        "back = lambda dy, *a, **o: layer_norm_backward(dy, layer_norm(*a, **o)[1])\n"
        "single = lambda f: lambda *a, **o: f(*a, **o).astype(a[0].dtype)\n"
        "report = check('layer_norm', single(ours), framework='numpy', backward=False)\n"
        "assert report.passed, report.failures\n"
    )
    ran = python("-c", script)
    assert ran.returncode == 0, ran.stderr
