"""The study of peers: a tiny one end to end, gone on with where it stopped, its tables, CSV and figure."""

import csv
import json
import sys

import pytest
from pictures import shows_something
from scripts import script

TINY = """--cuts 0.3 --two_way 0.3 --profiles request --prompt_tokens 64 --new_tokens 8 --seeds 0 --items 12 --windows 2
--calibration_windows 2 --generations 1 --steps 2 --pairs 2"""


@pytest.fixture(scope="module")
def study():
    return script("experiments/peers.py")


def rows_in(folder):
    """The rows of all cells, and when their files were written."""
    files = sorted(folder.glob("*-own.json"))
    rows = [row for path in files for row in json.loads(path.read_text()).values()]
    return rows, [path.stat().st_mtime_ns for path in files]


def call(study, monkeypatch, folder, *more):
    monkeypatch.setattr(sys, "argv", ["peers.py", "--output", str(folder), *TINY.split(), *more])
    study.main()


@pytest.mark.slow
def test_every_peer_is_measured_once_at_the_cut(study, monkeypatch, tmp_path, capsys):
    from ftp_lightning.baselines.registry import PEERS

    call(study, monkeypatch, tmp_path)
    rows, written = rows_in(tmp_path)
    assert {row["peer"] for row in rows} == set(PEERS)
    assert {row["schedule"] for row in rows if row["peer"] == "lazy_llm"} == {"own", "uniform", "searched"}
    assert all("unreachable" not in row for row in rows if row["schedule"] == "own")
    reached = [row for row in rows if "unreachable" not in row]
    for row in reached:
        assert row["kept"]["items"] == sum(row["need"]) > 5 and row["prefill_ms"] > 0 and row["decode_ms"] > 0
        if row["peer"] not in ("last_block_free", "deletion_surprisal"):
            assert abs(row["realised_cut"] - 0.3) < (0.07 if row["removed"] else 0.03)
    surprisal = next(row for row in rows if row["peer"] == "deletion_surprisal")
    assert surprisal["realised_cut"] < -0.5
    capsys.readouterr()
    call(study, monkeypatch, tmp_path)
    assert written == rows_in(tmp_path)[1]
    said = capsys.readouterr().out
    assert "### request, 30% of the FLOPs\n" in said and "by selector and schedule" in said and "not dominated" in said
    assert shows_something(tmp_path / "peers.png")
    assert len(list(csv.DictReader((tmp_path / "peers.csv").open()))) == len(rows)


def test_the_front_is_what_nothing_beats(study):
    points = {"a": [(0.2, 0.9), (0.4, 0.5)], "b": [(0.3, 0.9)], "c": [(0.305, 0.8)], "d": [(0.6, 0.1), (0.1, 0.2)]}
    assert study.tables.front(points) == {"a": [(0.4, 0.5)], "b": [(0.3, 0.9)], "d": [(0.6, 0.1)]}


def row(peer, cut, seed, right, kl, **more):
    kept = {"share": sum(right) / len(right), "low": 0.0, "high": 1.0, "items": len(right)}
    about = {"profile": "prefill", "schedule": "own", "right": right, "need": [True] * len(right)} | more
    about |= dict.fromkeys(("planned_cut", "realised_cut", "flops_cut", "nominal", "realised"), cut)
    measured = {"kept": kept, "kl": kl, "kl_rows": [kl] * 3, "kv": "keep", "kv_share": 1.0}
    return {"peer": peer, "cut": cut, "seed": seed} | measured | about


def test_the_tables_say_who_is_not_dominated_and_compare_ours_with_the_best_other(study, monkeypatch, tmp_path, capsys):
    rows = [
        row("lazy_llm", 0.3, 0, [1, 1, 1, 0], 0.3, prefill_ms=1.0, prefill_speedup=1.5),
        row("random", 0.3, 0, [0, 0, 0, 0], 0.9, prefill_ms=2.0, prefill_speedup=1.0),
        row("ftp_projected", 0.3, 0, [1, 1, 1, 1], 0.1, prefill_ms=1.0, prefill_speedup=1.2),
        row("ftp_projected", 0.3, 1, [1, 1, 1, 0], 0.3),
    ]
    (tmp_path / "prefill-0.3-own.json").write_text(json.dumps({str(i): one for i, one in enumerate(rows)}))
    call(study, monkeypatch, tmp_path, "--tables", "--profiles", "prefill")
    said = capsys.readouterr().out
    by_flops, by_time = said.split("not dominated")[1:]
    assert "| FTP, projected router, searched with it | KL |" in by_flops and "LazyLLM" not in by_flops
    assert "KL" in by_time.split("LazyLLM")[1].splitlines()[0] and "Random" not in by_time and "random" not in by_time
    assert "| 30% | LazyLLM (last token's attention) | 75.0 % | +12.5 [" in said  # +25 and 0, seed by seed
    assert "| 0.3000 | -0.1000 [-1.3706, +1.1706] |" in said  # two trainings: t = 12.7


def test_an_unknown_peer_is_told_before_anything_is_measured(study, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        call(study, monkeypatch, tmp_path, "--peers", "lazy_lm")
    assert stopped.value.code == 2
    assert "lazy_lm" in capsys.readouterr().err


def test_tables_of_nothing_are_empty(study, monkeypatch, tmp_path, capsys):
    call(study, monkeypatch, tmp_path, "--tables")
    assert capsys.readouterr().out == "" and not (tmp_path / "peers.csv").exists()


def test_trained_routers_are_asked_for_by_their_folder(study, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        call(study, monkeypatch, tmp_path, "--peers", "ftp_projected")
    assert "needs --projected FOLDER" in capsys.readouterr().err
    for more, there in (((), False), (("--projected", str(tmp_path)), True)):
        monkeypatch.setattr(sys, "argv", ["peers.py", *more])
        assert ("ftp_projected" in study.arguments().peers) is there


def test_the_first_seed_of_every_peer_comes_first(study, monkeypatch):
    words = "--profiles prefill --cuts 0.2,0.4 --seeds 0,1 --trained_seeds 0 --two_way= --peers random,mod,lazy_llm"
    monkeypatch.setattr(sys, "argv", ["peers.py", *words.split()])
    found = [(name, seed, cut) for _, cut, name, _, seed in study.jobs_of(study.arguments())]
    first = [(name, 0, cut) for name in ("random", "mod", "lazy_llm") for cut in (0.2, 0.4)]
    assert found == [*first, ("random", 1, 0.2), ("random", 1, 0.4)]
