from tests.benchmarks.profile import parse, tally

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
