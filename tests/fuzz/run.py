"""Fuzz the readers of files: ``python tests/fuzz/run.py [libFuzzer's options]``, or ``make fuzz``.

Without options: 10^7 executions or one hour, whichever comes first. The corpus is kept in build/fuzz/corpus, what
crashed in build/fuzz/crash-…; ``python tests/fuzz/run.py build/fuzz/crash-…`` runs that alone. The last line is a
summary as JSON; the exit status is 0 only if nothing unexpected happened.
"""

import json
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(ROOT / "tests")

from fuzz import seeds, targets  # noqa: E402

FOLDER = ROOT / "build" / "fuzz"
DEFAULT = ("-runs=10000000", "-max_total_time=3600")
# A reader that takes ten seconds or two gigabytes for 32 KiB is a fault as well. len_control: structure needs room.
LIMITS = (f"-max_len={seeds.MAX_BYTES}", "-len_control=0", "-timeout=10", "-rss_limit_mb=2048")


def read_counts(path: Path) -> dict[str, dict[str, int]]:
    numbers = struct.unpack(f"<{2 * len(targets.TARGETS)}Q", path.read_bytes())
    return {
        target.name: {"accepted": numbers[2 * i], "refused": numbers[2 * i + 1]}
        for i, target in enumerate(targets.TARGETS)
    }


def commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def fuzz(options: list[str]) -> int:
    version = commit()  # of what runs now, whatever is committed meanwhile
    alone = [option for option in options if not option.startswith("-")]
    FOLDER.mkdir(parents=True, exist_ok=True)
    counts, corpus, begin = FOLDER / "counts", FOLDER / "corpus", FOLDER / "seeds"
    counts.write_bytes(bytes(16 * len(targets.TARGETS)))
    corpus.mkdir(exist_ok=True)
    shutil.rmtree(begin, ignore_errors=True)
    begin.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        for i, content in enumerate(targets.inputs(Path(scratch))):
            (begin / f"{i:04}").write_bytes(content)
    before = {path.name for path in FOLDER.glob("*-*")}
    where = [] if alone else [str(corpus), str(begin)]
    artifacts = f"-artifact_prefix={FOLDER}/"
    command = [
        sys.executable,
        str(ROOT / "tests" / "fuzz" / "main.py"),
        str(counts),
        *where,
        *LIMITS,
        artifacts,
        *options,
    ]
    log = FOLDER / "log.txt"
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
        try:
            while process.poll() is None:
                time.sleep(1)
                if int(time.monotonic() - start) % 60 == 0:
                    done = sum(sum(c.values()) for c in read_counts(counts).values())
                    print(f"{time.monotonic() - start:6.0f} s  {done:>10,} executions", flush=True)
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
    seconds = time.monotonic() - start
    if (place := FOLDER / "place").exists():
        shutil.rmtree(place.read_text(), ignore_errors=True)
        place.unlink()
    text = log.read_text(errors="replace")
    found = sorted({path.name for path in FOLDER.glob("*-*")} - before)
    by_target = read_counts(counts)
    runs = sum(sum(c.values()) for c in by_target.values())
    if process.returncode:
        at = text.find("=== Uncaught Python exception")
        print(text[at : at + 6000] if at >= 0 else text[-6000:])
    coverage = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", text)
    print(
        json.dumps(
            {
                "executions": runs,
                "seconds": round(seconds, 1),
                "per_second": round(runs / seconds),
                "unexpected": 0 if process.returncode == 0 else 1,
                "artifacts": found,
                "coverage": dict(zip(("edges", "features", "corpus"), map(int, coverage[-1]), strict=True))
                if coverage
                else {},
                "targets": by_target,
                "commit": version,
            }
        )
    )
    return 0 if process.returncode == 0 else 1


if __name__ == "__main__":
    sys.exit(fuzz(sys.argv[1:] or list(DEFAULT)))
