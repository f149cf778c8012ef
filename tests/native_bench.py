"""``make bench-native``: builds and runs native/bench_linear.cpp, which times products by plans of one's own.

Not collected by pytest."""

import subprocess
import sys
import tempfile
from pathlib import Path

from sanitize import NATIVE, build_settings, ninja_file


def main(arguments: list[str]) -> int:
    settings = build_settings()
    with tempfile.TemporaryDirectory() as folder:
        flags = f"{settings.CXX_FLAGS} -fopenmp"
        Path(folder, "build.ninja").write_text(ninja_file(settings, flags, [NATIVE / "bench_linear.cpp"], []))
        subprocess.run([sys.executable, "-m", "ninja", "-C", folder, "--quiet"], check=True)
        return subprocess.run([str(Path(folder, "bench_linear")), *arguments], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
