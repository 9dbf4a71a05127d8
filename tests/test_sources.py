"""Where a transfer attack's models come from, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from robustbench_local.attacks.transfer import Source
from robustbench_local.data import Dataset
from robustbench_local.defenses.recipe import Standard
from robustbench_local.errors import UserError
from robustbench_local.models import build_model, model_key
from robustbench_local.sources import get_sources, identify
from robustbench_local.training import Schedule, Trained, fit

CPU = torch.device("cpu")
MODEL = {
    "_target_": "robustbench_local.models.MLP",
    "hidden": [8],
    "checkpoint": None,
    "mean": None,
    "std": None,
}
SCHEDULE = Schedule(epochs=1, batch_size=500, learning_rate=0.01)


def trained(data: Dataset, cache: Path, seed: int, hidden: int = 8) -> Trained:
    config = {**MODEL, "hidden": [hidden]}
    return fit(
        lambda: build_model(config, data),
        data,
        Standard(),
        SCHEDULE,
        seed=seed,
        device=CPU,
        cache=cache,
        key={"model": model_key(config), "precision": "float32"},
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def victim(digits: Dataset, cache: Path) -> Trained:
    return trained(digits, cache, 0)


def found(name: str, data: Dataset, cache: Path, victim: Trained) -> Source:
    settings = {"model": MODEL, "paths": {"cache": str(cache)}}
    (source,) = get_sources(
        [name],
        settings,
        data,
        victim,
        train=lambda seed: trained(data, cache, seed),
        device=CPU,
    )
    return source


def answers(model: nn.Module, data: Dataset) -> torch.Tensor:
    with torch.no_grad():
        return model(data.test.pixels(slice(0, 20)))


def test_a_seed_is_trained_or_found(digits: Dataset, cache: Path, victim: Trained) -> None:
    first = found("seed:7", digits, cache, victim)
    again = found("seed:7", digits, cache, victim)
    expected = trained(digits, cache, 7)
    assert first.key == again.key == expected.key
    assert first.sha256 == expected.sha256
    assert torch.equal(answers(again.model, digits), answers(expected.model, digits))


def test_weights_of_another_architecture_out_of_the_cache(
    digits: Dataset, cache: Path, victim: Trained
) -> None:
    other = trained(digits, cache, 7, hidden=5)
    before = torch.get_rng_state()
    source = found(f"cache:{other.key[:9]}", digits, cache, victim)
    assert torch.equal(torch.get_rng_state(), before)
    assert (source.key, source.sha256) == (other.key, other.sha256)
    assert torch.equal(answers(source.model, digits), answers(other.model, digits))
    assert not source.model.training


def test_weights_of_ones_own(digits: Dataset, cache: Path, victim: Trained, tmp_path: Path) -> None:
    other = trained(digits, cache, 7)
    file = tmp_path / "own.pt"
    torch.save({"state_dict": other.model.network.state_dict()}, file)
    source = found(f"file:{file}", digits, cache, victim)
    assert torch.equal(answers(source.model, digits), answers(other.model, digits))


def test_the_victim_itself_is_refused_whatever_it_comes_as(
    digits: Dataset, cache: Path, victim: Trained, tmp_path: Path
) -> None:
    torch.save({"state_dict": victim.model.network.state_dict()}, tmp_path / "inner.pt")
    save_file(victim.model.state_dict(), tmp_path / "whole.safetensors")
    forms = (
        "seed:0",
        f"cache:{victim.key}",
        f"file:{tmp_path / 'inner.pt'}",
        f"file:{tmp_path / 'whole.safetensors'}",
    )
    for name in forms:
        with pytest.raises(UserError, match="has the weights of the victim itself"):
            found(name, digits, cache, victim)


def test_a_prefix_has_to_fit_one_key(digits: Dataset, cache: Path, victim: Trained) -> None:
    keys = [victim.key, *(trained(digits, cache, seed).key for seed in range(1, 18))]
    assert len({key[0] for key in keys}) < len(keys)  # of 18 keys two begin alike
    first = next(key[0] for key in keys if sum(k[0] == key[0] for k in keys) > 1)
    with pytest.raises(UserError, match=r"fits [0-9]+ sets of weights") as caught:
        found(f"cache:{first}", digits, cache, victim)
    assert all((key in str(caught.value)) == (key[0] == first) for key in keys)
    assert "(MLP, Standard, seed " in str(caught.value)
    with pytest.raises(UserError, match=r"fits no weights .* and 8 more"):
        found("cache:xyz", digits, cache, victim)


def test_weights_for_other_images_are_refused(
    digits: Dataset, cache: Path, victim: Trained
) -> None:
    about = cache / "weights" / f"{victim.key}.json"
    text = about.read_text()
    about.write_text(text.replace('"classes": 10', '"classes": 7'))
    with pytest.raises(UserError, match="knows 7 classes; expected shape"):
        found(f"cache:{victim.key}", digits, cache, victim)
    about.write_text(text.replace('"classes": 10', '"classes": 10 '))
    (cache / "weights" / f"{victim.key}.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="are damaged"):
        found(f"cache:{victim.key}", digits, cache, victim)


@pytest.mark.parametrize("target", ["builtins.print", "os.nothing", "no_such_module.Net"])
def test_only_networks_are_built(
    target: str, digits: Dataset, cache: Path, victim: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    about = cache / "weights" / f"{victim.key}.json"
    told = json.loads(about.read_text())
    told["parts"]["model"]["_target_"] = target
    about.write_text(json.dumps(told))
    with pytest.raises(UserError, match=f"names {target}, which is no class of networks"):
        found(f"cache:{victim.key}", digits, cache, victim)
    assert capsys.readouterr().out == ""


def test_files_that_do_not_fit_are_refused(
    digits: Dataset, cache: Path, victim: Trained, tmp_path: Path
) -> None:
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "linear.pt")
    for file, complaint in (("linear.pt", "does not fit the model"), ("none.pt", "is missing")):
        with pytest.raises(UserError, match=complaint) as caught:
            found(f"file:{tmp_path / file}", digits, cache, victim)
        assert str(caught.value).startswith(f"attack.sources entry file:{tmp_path / file}")


def test_an_entry_is_known_by_its_content(
    digits: Dataset, cache: Path, victim: Trained, tmp_path: Path
) -> None:
    first, second = tmp_path / "a.pt", tmp_path / "b.pt"
    first.write_bytes(b"one")
    second.write_bytes(b"one")
    assert identify(f"file:{first}", cache) == identify(f"file:{second}", cache)
    second.write_bytes(b"two")
    assert identify(f"file:{first}", cache) != identify(f"file:{second}", cache)
    assert identify("file:nowhere", cache) == "file:nowhere"
    assert identify(f"cache:{victim.key[:5]}", cache) == f"cache:{victim.key}"
    assert identify("seed:3", cache) == "seed:3"
    assert identify("cache:zzz", cache) == "cache:zzz"
