"""One method on one network and seed is a job. What it returns is saved as soon as it is done, and taken over by a
later run with the same settings, code and libraries."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

import inq_kernels
from inq_kernels import files

from .methods import METHODS, Given
from .tasks import DigitsTask, Task

LIBRARIES = ("torch", "numpy", "scikit-learn", "scipy", "safetensors", "zstandard")
LANGUAGE_MODEL = "language-model"
SOURCES = ("language", "methods", "networks", "tasks")


@dataclass(frozen=True)
class Job:
    """A network, a method, a seed."""

    network: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """Of its files, and for people."""
        return f"{self.network}-{self.method}-seed{self.seed}"

    def other(self, method: str) -> Job:
        """The same network and seed by another method."""
        return dataclasses.replace(self, method=method)


@functools.cache
def fingerprint() -> dict:
    """What results depend on besides their settings: the code, as one hash, and the libraries."""
    package, here = Path(inq_kernels.__file__).parent, Path(__file__).parent
    digest = hashlib.sha256()
    # Of this folder only what trains and measures: a change of a table's words runs nothing again.
    paths = [*package.rglob("*.py"), *package.glob("_cpu.so"), *(here / f"{name}.py" for name in SOURCES)]
    for path in [*sorted(paths), here.parent / "language_model.py"]:
        digest.update(f"{path.name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return {"code": digest.hexdigest(), **{name: importlib.metadata.version(name) for name in LIBRARIES}}


def task_of(network: str, recipes: dict) -> Task:
    """The network with its training. ``recipes`` has one for the digits, and one for the language model."""
    if network == LANGUAGE_MODEL:
        from .language import LanguageTask

        return LanguageTask(recipes[LANGUAGE_MODEL])
    return DigitsTask(network, recipes["digits"])


@dataclass(frozen=True)
class Store:
    """Where results are: ``jobs/NAME.json``, and ``starts/NAME.safetensors`` for networks that others begin with."""

    out: Path
    recipes: dict

    def key(self, job: Job) -> dict:
        """What a saved result must agree with to be taken over, as JSON has it."""
        recipe = self.recipes[LANGUAGE_MODEL if job.network == LANGUAGE_MODEL else "digits"]
        key = {**dataclasses.asdict(job), "recipe": dataclasses.asdict(recipe), **fingerprint()}
        if job.network == LANGUAGE_MODEL:
            from .. import language_model

            # Python's own files, which another Python has others of. The digits come with scikit-learn.
            key["data"] = language_model.corpus()[2]
        return json.loads(json.dumps(key))

    def load(self, job: Job) -> dict | None:
        """A saved result; None if there is none of these settings, or it has lost the network that it left."""
        with suppress(OSError, json.JSONDecodeError, KeyError, TypeError):
            saved = json.loads(self._result(job).read_text(encoding="utf-8"))
            if saved["key"] == self.key(job) and (not saved["left"] or self._network(job).exists()):
                return saved
        return None

    def run(self, job: Job) -> dict:
        """Run a job, whose earlier ones are done, and save its result."""
        torch.set_num_threads(1)
        began = time.process_time()
        after = METHODS[job.method].after
        results = {method: self.load(job.other(method)) for method in after}
        if missing := [method for method, result in results.items() if result is None]:
            raise RuntimeError(f"tables: {job.name}: expected the results of {', '.join(missing)}, got none")
        tensors = {method: load_file(self._network(job.other(method))) for method in after}
        given = Given(task_of(job.network, self.recipes), job.seed, tensors, results)
        result, left = METHODS[job.method].run(given)
        if left:
            files.write_safetensors(self._network(job), left, {"format": "pt"})
        result |= {"key": self.key(job), "left": bool(left), "cpu_s": round(time.process_time() - began, 2)}
        files.write_text(self._result(job), json.dumps(result, indent=1, allow_nan=False))
        return result

    def _result(self, job: Job) -> Path:
        return self.out / "jobs" / f"{job.name}.json"

    def _network(self, job: Job) -> Path:
        return self.out / "starts" / f"{job.name}.safetensors"


def jobs(methods: Mapping[str, Iterable[str]], seeds: Sequence[int]) -> list[Job]:
    """Those of each network, and those that they begin with; seed by seed, so that a run that is stopped has whole
    seeds."""
    needed = {network: _with_earlier(set(names)) for network, names in methods.items()}
    return [Job(net, method, seed) for seed in seeds for net in needed for method in METHODS if method in needed[net]]


def _with_earlier(methods: set[str]) -> set[str]:
    while more := {earlier for method in methods for earlier in METHODS[method].after} - methods:
        methods = methods | more
    return methods


def run_all(
    store: Store, todo: Sequence[Job], processes: int, done: Callable[[Job, dict, bool], None] = lambda *_: None
) -> dict[Job, dict]:
    """The results of ``todo``, each after those that it begins with, in ``processes`` processes.

    Args:
        done: called with each job, its result, and whether it was taken over.
    """
    for folder in ("jobs", "starts"):
        (store.out / folder).mkdir(parents=True, exist_ok=True)
    results: dict[Job, dict] = {}

    def finish(job: Job, result: dict, again: bool) -> None:
        results[job] = result
        done(job, result, again)

    left = []
    for job in todo:
        saved = store.load(job)
        if saved is None:
            left.append(job)
        else:
            finish(job, saved, True)
    if processes == 1:
        # METHODS is in an order in which earlier ones come first.
        for job in left:
            finish(job, store.run(job), False)
        return results
    # Not fork: torch's threads do not survive it.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        running: dict[Future, Job] = {}
        try:
            while left or running:
                ready = [job for job in left if all(job.other(m) in results for m in METHODS[job.method].after)]
                # Few at a time, so that those that come first are first.
                for job in ready[: max(2 * processes - len(running), 0)]:
                    left.remove(job)
                    running[pool.submit(store.run, job)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    finish(running.pop(future), future.result(), False)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results
