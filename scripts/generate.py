"""Generate the Python stubs in mailgrpc/v1 from proto/, or check that they are up to date.

    python scripts/generate.py            write them
    python scripts/generate.py --check    exit 1 and name the stale files, changing nothing
    python scripts/generate.py --release  freeze proto/mailgrpc as the contract that was released:
                                          `buf breaking` compares with that copy

It needs the development dependencies alone (grpcio-tools, mypy-protobuf): no network, no node.

The contract carries its limits as buf.validate options, but a caller of `mailgrpc.v1` should not
need a package for them. So this takes two steps: compile the contract, drop the options and the
import, and generate from what is left.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import grpc_tools
from google.protobuf.descriptor_pb2 import FileDescriptorSet

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
VENDOR = PROTO / "vendor"
RELEASED = PROTO / "released"
STUBS = ROOT / "mailgrpc" / "v1"
WELL_KNOWN = Path(grpc_tools.__file__).parent / "_proto"
VALIDATE = "buf/validate/validate.proto"
HANDWRITTEN = {"__init__.py"}


def main() -> int:
    parser = argparse.ArgumentParser(description="Generate the stubs in mailgrpc/v1 from proto/.")
    parser.add_argument("--check", action="store_true", help="only tell whether they are stale")
    parser.add_argument("--release", action="store_true", help="freeze the released contract")
    options = parser.parse_args()
    if options.release:
        freeze()
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        fresh = generate(Path(scratch))
        stale = stale_files(fresh)
        if options.check:
            for line in stale:
                print(line, file=sys.stderr)
            if stale:
                print("run: python scripts/generate.py", file=sys.stderr)
            return 1 if stale else 0
        replace_stubs(fresh)
    return 0


def generate(scratch: Path) -> Path:
    """Generate into a directory below `scratch` and return it."""
    files = sorted(path.relative_to(PROTO).as_posix() for path in PROTO.glob("mailgrpc/**/*.proto"))
    services = [name for name in files if name.endswith("_service.proto")]
    compiled, plain, out = scratch / "compiled", scratch / "plain", scratch / "out"
    out.mkdir()
    protoc(
        *(f"-I{path}" for path in (PROTO, VENDOR, WELL_KNOWN)),
        "--include_imports",
        "--include_source_info",  # the comments, which become docstrings
        f"--descriptor_set_out={compiled}",
        *files,
    )
    plain.write_bytes(without_validation(compiled.read_bytes()))
    protoc(
        f"--descriptor_set_in={plain}",
        plugin("protoc-gen-mypy"),
        f"--python_out={out}",
        f"--mypy_out=quiet:{out}",
        *files,
    )
    # Apart, because grpc_python writes an empty module for each file without a service. A servicer
    # need not have every method: what it leaves out answers UNIMPLEMENTED.
    protoc(
        f"--descriptor_set_in={plain}",
        plugin("protoc-gen-mypy_grpc"),
        f"--grpc_python_out={out}",
        f"--mypy_grpc_out=quiet,generate_concrete_servicer_stubs:{out}",
        *services,
    )
    return out / "mailgrpc" / "v1"


def without_validation(compiled: bytes) -> bytes:
    """The same descriptor set without the buf.validate options and their definition."""
    files = FileDescriptorSet.FromString(compiled)
    # This process never loads the extensions of buf.validate, so they are unknown fields here.
    files.DiscardUnknownFields()
    kept = FileDescriptorSet()
    for file in files.file:
        if file.name == VALIDATE:
            continue
        if VALIDATE in file.dependency:
            file.dependency.remove(VALIDATE)
        kept.file.append(file)
    return kept.SerializeToString(deterministic=True)


def protoc(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *arguments], check=True)


def plugin(name: str) -> str:
    """Name a protoc plugin of this environment, whether or not it is on the PATH."""
    beside = Path(sys.executable).parent / name
    path = beside if beside.exists() else shutil.which(name)
    if path is None:
        raise SystemExit(f"{name} is missing: install the development dependencies")
    return f"--plugin={name}={path}"


def stale_files(fresh: Path) -> list[str]:
    """What differs between the committed stubs and fresh ones, a line a file."""
    wanted, present = stub_names(fresh), stub_names(STUBS)
    lines = [f"missing: {name}" for name in wanted - present]
    lines += [f"not generated any more: {name}" for name in present - wanted]
    for name in wanted & present:
        if not filecmp.cmp(fresh / name, STUBS / name, shallow=False):
            lines.append(f"stale: {name}")
    return sorted(lines)


def stub_names(directory: Path) -> set[str]:
    return {path.name for path in directory.glob("*.py*") if path.name not in HANDWRITTEN}


def replace_stubs(fresh: Path) -> None:
    for name in stub_names(STUBS) - stub_names(fresh):
        (STUBS / name).unlink()
    for name in stub_names(fresh):
        shutil.copyfile(fresh / name, STUBS / name)


def freeze() -> None:
    """Copy the contract to proto/released. Part of making a release, and of nothing else."""
    target = RELEASED / "mailgrpc"
    shutil.rmtree(target, ignore_errors=True)
    for path in PROTO.glob("mailgrpc/**/*.proto"):
        copy = RELEASED / path.relative_to(PROTO)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


if __name__ == "__main__":
    sys.exit(main())
