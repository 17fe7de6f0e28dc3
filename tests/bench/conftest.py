"""Without SAEBench there is nothing to collect here; tests/test_bench_extra.py says so."""

import importlib.util

if importlib.util.find_spec("sae_bench") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from tests.bench.fixtures import model, sae, snippets, source, upstream_run  # noqa: F401
