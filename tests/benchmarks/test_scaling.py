"""What `benchmarks.scaling` makes of measurements: errors of the prediction, speed-ups, and what it keeps of them."""

from __future__ import annotations

import json

import pytest

from benchmarks import scaling
from benchmarks.harness import Figures
from benchmarks.scaling_model import Profile, step_seconds

MIB = 1 << 20
KS = (0, 6)
MODELS = ["resnet", "minilm"]


def found(nodes: int) -> dict:
    """Measurements that the model predicts to the second; the bare network is quicker than the wrapped one by half."""
    profiles = {}
    for model, size in (("resnet", MIB), ("minilm", 90 * MIB)):
        for k in KS:
            gradients = [(0.01 * i, size // (1 + k) // 10) for i in range(1, 11)]
            wrapped = {"forward_s": 0.1 / (1 + k), "backward_s": 0.2 / (1 + k), "optimizer_s": 0.1}
            bare = {name: value / 2 for name, value in wrapped.items()}
            profiles[f"{model} {k}"] = {
                "wrapped": {**wrapped, "gradients": gradients, "broadcasts": [4096, 8]},
                "bare": {**bare, "gradients": gradients},
            }
    links: dict = {link: {"all_reduce_s": {"4": 0.001, str(scaling.LARGE): 0.02}} for link in scaling.RATES}
    made = {"profiles": profiles, "links": links, "weights": "random"}
    for link in scaling.RATES:
        for case, raw in profiles.items():
            took = step_seconds(scaling.profile_of(raw["wrapped"]), nodes, scaling.network_of(made, nodes, link))
            links[link][case] = {"step_s": [took, took, 9.0], "hook_bytes": 100, "wire_bytes": 101}
    return made


@pytest.fixture
def published(tmp_path, capsys):
    by_nodes = {2: found(2), 3: found(3)}
    figures = Figures("scaling")
    scaling.report(figures, by_nodes, MODELS, KS)
    scaling.keep(figures, by_nodes)
    figures.publish(quick=False, results=tmp_path)
    return json.loads((tmp_path / "scaling.json").read_text()), by_nodes


def test_errors_are_those_of_the_wrapped_profile_and_the_bare_one_stands_beside_it(published):
    figures = published[0]["figures"]
    assert figures["prediction_error_max"] == figures["prediction_error_max_minilm"] == pytest.approx(0, abs=1e-9)
    assert 0.1 < figures["prediction_error_max_bare"] <= 0.5
    assert figures["wire_over_hook_bytes"] == 1.01
    for key in ("speedup_2hosts_1gbit_k6", "resnet_speedup_2hosts_unlimited_k6", "predicted_speedup_64"):
        assert figures[key] > 1


def test_the_results_file_holds_enough_to_predict_again(published):
    record, by_nodes = published
    for nodes, one in by_nodes.items():
        for case, raw in one["profiles"].items():
            kept = dict(record["conditions"][f"{nodes} hosts, profile, {case} blocks, wrapped"])
            gradients = tuple(tuple(bucket) for bucket in json.loads(kept.pop("buckets")))
            again = Profile(**{**kept, "broadcasts": tuple(kept["broadcasts"])}, gradients=gradients)
            network = scaling.network_of(one, nodes, "1gbit")
            first = step_seconds(scaling.profile_of(raw["wrapped"]), nodes, network)
            assert step_seconds(again, nodes, network) == pytest.approx(first, rel=1e-3)
            assert record["conditions"][f"{nodes} hosts, all_reduce seconds"]["1gbit"] == {
                "4": 0.001,
                str(scaling.LARGE): 0.02,
            }
