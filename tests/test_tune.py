"""``inq bench tune``: which tiles are tried, and which is chosen, without a GPU."""

import itertools
import os

import pytest
import torch

from inq_kernels import backends
from inq_kernels.cli import main

pytest.importorskip("triton")
from inq_kernels.bench import machine, tune
from inq_kernels.bench.timing import CpuClock
from inq_kernels.triton_ops import tiles


def test_the_fastest_tile_is_chosen_by_more_than_noise():
    default, other, third = tune.Tile(128, 16, 64, 4, 3), tune.Tile(64, 16, 64, 4, 3), tune.Tile(256, 16, 64, 4, 3)
    # Geometric means over shapes: 2 and 0.5 are no gain.
    assert tune.best(default, {default: [1.0, 1.0], other: [2.0, 0.5]}) == (default, 1.0)
    assert tune.best(default, {default: [1.0, 1.0], other: [0.98, 0.98]}) == (default, 1.0)
    assert tune.best(default, {default: [1.0, 1.0], other: [0.9, 0.8], third: [0.9, 0.9]})[0] == other
    # Who failed for one shape is out, however fast on the other; even the default.
    assert tune.best(default, {default: [1.0, 1.0], other: [0.1, None]}) == (default, 1.0)
    assert tune.best(default, {default: [None], other: [5.0, 5.0]})[0] == other
    assert tune.best(default, {default: [None]}) == (default, 1.0)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_tiles_to_try_are_tiles_that_kernels_can_have(capability, tmp_path):
    table = tiles.defaults(capability)
    # Rows for ragged N are in tiles that others have already.
    assert set(tune.KINDS) == {name for name in table if not name.endswith(" ragged")}
    assert set(tune.MS) == set(tiles.ROWS)
    for name, rows in itertools.chain(*(itertools.product([name], table[name]) for name in tune.KINDS)):
        found = tune.candidates(name, rows, table[name][rows], capability)
        assert found[0] == table[name][rows]
        assert len(set(found)) == len(found)
        assert 5 <= len(found) <= 100
        for tile in found:
            tiles.save(tmp_path / "t.json", "", {name: {rows: tile}})
            assert tiles.load(tmp_path / "t.json", capability=capability)[name][rows] == tile
        # TF32 there, whatever precision is asked for.
        if capability == 100 and name.startswith("linear fp32"):
            assert max(tile.bn for tile in found) < 64


def test_tuning_with_a_timer_that_is_not_a_gpu(tmp_path):
    table, asked, said = tiles.defaults(90), [], []
    wanted = {"linear fp16": tune.candidates("linear fp16", 16, table["linear fp16"][16], 90)[1]}

    def measure(name, rows, tile, shape, m):
        asked.append((name, rows, shape, m))
        if tile.bn == 256 and tile != table[name][rows]:
            return None  # does not build
        return 1.0 if tile == wanted.get(name) else 2.0

    shapes = ((64, 128), (128, 64))
    found = tune.search(table, ("linear fp16", "linear_dx bf16"), shapes, 90, measure, said.append)
    assert found == {"linear fp16": {16: wanted["linear fp16"]}}
    assert {(rows, shape, m) for name, rows, shape, m in asked if name == "linear fp16"} >= {
        (16, shape, m) for shape in shapes for m in (1, 16)
    }
    assert any("0.50 of the default's time" in line for line in said)
    tiles.save(tmp_path / "tiles.json", "a GPU", found)
    assert tiles.load(tmp_path / "tiles.json", table)["linear fp16"][16] == wanted["linear fp16"]
    # Time that is over begins nothing more.
    clock = iter(range(0, 1000, 10))
    del asked[:], said[:]
    tune.search(table, ("linear fp16",), shapes, 90, measure, said.append, within=15, now=lambda: next(clock))
    assert len(said) == 4
    assert "left out" in said[-1]
    assert {rows for _, rows, _, _ in asked} == {16}


def test_a_tile_is_measured_as_users_would_have_it(tmp_path, monkeypatch):
    """On the CPU: the launcher gets the tile from the file, a wrong result has no time, nor has what does not build."""
    if not backends.interpreting():
        pytest.skip("Triton's kernels are not interpreted")
    monkeypatch.setattr(machine, "last_level_cache", lambda: 1 << 16)
    chosen, select = [], tiles.select
    monkeypatch.setattr(tiles, "select", lambda *a, **b: chosen.append(select(*a, **b)) or chosen[-1])
    measure = tune.OnDevice(tmp_path, "cpu", CpuClock)
    tile = tiles.Tile(32, 16, 16, 4, 2)
    for name in ("linear bf16", "linear_dx bf16"):
        assert measure(name, 16, tile, (64, 40), 3) > 0
        assert {choice.tile for choice in chosen} == {tile}
        chosen.clear()
    assert tiles.ENVIRONMENT not in os.environ
    work = next(iter(measure._work.values()))
    work.candidate.calls = [lambda call=call: call() + 1 for call in work.candidate.calls]
    assert measure("linear_dx bf16", 16, tile, (64, 40), 3) is None
    work.candidate.calls = [lambda: 1 / 0]
    assert measure("linear_dx bf16", 16, tile, (64, 40), 3) is None


def test_what_was_measured_is_kept(tmp_path, monkeypatch):
    """A folder that cannot be written to costs no time; an interruption leaves what was found before it."""
    monkeypatch.setattr(tune.gpu, "describe", lambda: {"gpu": "a GPU", "capability": 90})

    class Interrupted(Exception):
        pass

    asked, faster = [], tune.candidates("linear fp16", 16, tiles.HOPPER["linear fp16"][16], 90)[1]

    def measure(self, name, rows, tile, shape, m):
        asked.append(rows)
        if rows == 32:
            raise Interrupted
        return 1.0 if tile == faster else 2.0

    monkeypatch.setattr(tune.OnDevice, "__call__", measure)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        tune.run(tmp_path / "file", ((64, 64),), ["linear fp16"], None)
    assert not asked
    with pytest.raises(Interrupted):
        tune.run(tmp_path / "folder", ((64, 64),), ["linear fp16"], None)
    table = tiles.load(tmp_path / "folder" / "tiles.json", tiles.HOPPER)
    assert table["linear fp16"] == tiles.HOPPER["linear fp16"] | {16: faster}


def test_tuning_needs_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for more in ((), ("--device", "cuda")):
        assert main(["bench", "tune", "--out", str(tmp_path), *more]) == 1
        assert "tune: expected --device cuda and a CUDA device here" in capsys.readouterr().err
