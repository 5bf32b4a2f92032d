"""The build backend: maturin's, plus the launcher.

maturin makes a wheel of either a library or a program; this project is both, in one crate. So
the launcher is built first, and handed to maturin as a data file that installers put into bin/.

Both are built with the same environment, and so is what `cargo build` and `cargo test` make by
hand: otherwise pyo3-ffi and everything on top of it would be compiled anew at every switch.
"""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import maturin
from maturin import (
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = "tractor-host"
DATA = ROOT / tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["maturin"]["data"]

# maturin asks for its data folder in every step, also in those before the build.
DATA.mkdir(parents=True, exist_ok=True)
# It is the build backend after all, if by way of this file.
os.environ["MATURIN_NO_MISSING_BUILD_BACKEND_WARNING"] = "1"
# Without build isolation nobody has put the environment's bin/ on PATH.
if shutil.which("maturin") is None:
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def build_wheel(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    _build_launcher()
    name: str = maturin.build_wheel(wheel_directory, config_settings, metadata_directory)
    return name


def build_editable(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    _build_launcher()
    name: str = maturin.build_editable(wheel_directory, config_settings, metadata_directory)
    return name


def _build_launcher() -> None:
    # PEP 517 runs a backend with the interpreter that is built for. The other two are what maturin
    # sets, and .cargo/config.toml for cargo by hand.
    os.environ["PYO3_PYTHON"] = sys.executable
    os.environ["PYO3_BUILD_EXTENSION_MODULE"] = "1"
    os.environ["PYO3_ENVIRONMENT_SIGNATURE"] = "cpython-3.14-64bit"
    # For maturin's own call of cargo, which comes next. (A source distribution loses the x bit.)
    cargo = ROOT / "scripts" / "cargo-for-maturin"
    if not os.access(cargo, os.X_OK):
        cargo.chmod(0o755)
    os.environ["CARGO"] = str(cargo)

    command = ["cargo", "build", "--release", "--lib", "--bin", LAUNCHER]
    command += ["--message-format", "json-render-diagnostics"]
    print("Running", *command, flush=True)
    built = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=False)
    if built.returncode != 0:
        sys.exit(f"error: cargo could not build {LAUNCHER}")
    messages = (json.loads(line) for line in built.stdout.splitlines())
    launcher = next(
        message["executable"]
        for message in messages
        if message["reason"] == "compiler-artifact" and message.get("executable")
    )

    scripts = DATA / "scripts"
    shutil.rmtree(scripts, ignore_errors=True)
    scripts.mkdir(parents=True)
    shutil.copy2(launcher, scripts / LAUNCHER)
