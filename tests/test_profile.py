from tests.benchmarks.profile import keep, page, parse, tally

STACK = "main (recipes/irn.py:300);Conv2d.forward (torch/nn/modules/conv.py:560)"


def test_a_line_of_the_profiler_is_read() -> None:
    stack, seen = parse(f"{STACK};<listcomp> (wsss_modules/cam.py) 12")
    assert seen == 12
    assert stack == [
        ("main", "recipes/irn.py"),
        ("Conv2d.forward", "torch/nn/modules/conv.py"),
        ("<listcomp>", "wsss_modules/cam.py"),
    ]


def test_samples_go_to_our_innermost_function_and_waiting_threads_to_none() -> None:
    waits = "run (recipes/pipeline/run.py:399);Condition.wait (threading.py:331)"
    own = "walk (wsss_modules/random_walk.py:7)"
    found, samples = tally("\n".join([f"{STACK} 3", f"{STACK} 4", f"{waits} 50", f"{own} 2", "start (site.py:1) 1"]))
    assert samples == 10
    assert found["recipes/irn.py main", "Conv2d.forward"] == 7
    assert found["wsss_modules/random_walk.py walk", ""] == 2
    assert found["start of the process", "start"] == 1


def result(seconds: float) -> dict:
    return {"seconds": seconds, "rows": [{"ours": "recipes/irn.py main", "calls": "conv", "share": 0.5}]}


OF_BEFORE = {"stages": {"labels": result(3.0), "masks": result(4.0)}, "conditions": {"commit": "old", "threads": "1"}}


def test_stages_that_ran_at_different_times_each_say_under_which_conditions() -> None:
    assert page({"irn": OF_BEFORE}).count("commit old, threads 1") == 1
    stored = keep(OF_BEFORE, "masks", result(5.0), {"commit": "new", "threads": "2"})
    stored = keep(stored, "segment", result(6.0), {"commit": "old", "threads": "1"})
    assert list(stored["stages"]) == ["labels", "masks", "segment"]
    text = page({"irn": stored})
    labels, masks, segment = (text.partition(f"### {stage}: ")[2].partition("###")[0] for stage in stored["stages"])
    assert text.partition("## irn")[2].partition("###")[0].strip() == "commit old, threads 1"
    assert masks.startswith("5 s\n\ncommit new, threads 2\n\n| where |")
    assert labels.startswith("3 s\n\n| where |")
    assert segment.startswith("6 s\n\n| where |")


def test_the_page_says_that_loader_processes_are_left_out() -> None:
    assert "loader processes do, reading and augmenting images, is left out" in page({})
