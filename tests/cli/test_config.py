"""Every configuration file composes and builds; every command that is quoted composes."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import OmegaConf

from robustbench_local.__main__ import CONF, lifted, options_first
from robustbench_local.attacks import Attack
from robustbench_local.building import build, build_attack
from robustbench_local.data import Source
from robustbench_local.defenses import Defense
from robustbench_local.evaluation import Audit
from robustbench_local.presets import prefer_own_presets
from robustbench_local.results.__main__ import parser
from robustbench_local.selftest.__main__ import HELP
from robustbench_local.selftest.__main__ import composed as composed_selftest
from robustbench_local.threat import ThreatModel
from robustbench_local.tracking import build_tracker
from robustbench_local.training import Schedule

ROOT = Path(__file__).parents[2]
GROUPS = ("attack", "audit", "dataset", "defense", "model", "threat", "tracking", "train")
FILES = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
PAGES = [ROOT / "README.md", *sorted((ROOT / "experiments").glob("*.md")), CONF / "config.yaml"]


def composed(*overrides):
    prefer_own_presets()  # as the command does
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=True)


def attack_of(config, samples=1):
    return build_attack({"attack": OmegaConf.to_container(config.attack, resolve=True)}, samples)


def test_readme_names_every_group_and_every_experiment():
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    rows = {row.split("`")[1]: row for row in lines if row.startswith("| `")}
    assert set(GROUPS) <= rows.keys()
    said = rows["experiment"].split("|")[2]
    assert {name.strip(" `") for name in said.split(",")} == {
        path.stem for path in (CONF / "experiment").glob("*.yaml")
    }


@pytest.mark.parametrize(("group", "choice"), FILES)
def test_every_file_builds_what_its_group_means(group, choice):
    config = composed(f"{group}={choice}")
    node = config[group]
    if group == "attack":
        assert isinstance(attack_of(config), Attack)
    elif group == "audit":
        assert build(node) == Audit(level=choice)  # the file says what the code would do without
    elif group == "dataset":
        assert isinstance(build(node), Source)
    elif group == "threat":
        assert isinstance(build(node), ThreatModel)
    elif group == "defense":
        assert Defense(**build(node)).name == choice
    elif group == "tracking":
        tracker = build_tracker(node)
        assert tracker is None if choice == "none" else type(tracker).__name__.lower() == choice
    elif group == "train":
        Schedule.from_config(OmegaConf.to_container(node, resolve=True))
    elif choice == "custom":
        assert OmegaConf.is_missing(node, "_target_")
    else:
        arguments = {key: node[key] for key in node if key not in ("checkpoint", "mean", "std")}
        network = instantiate(arguments, input_shape=(3, 32, 32), num_classes=7)
        assert sum(weight.numel() for weight in network.parameters()) > 1000


@pytest.mark.parametrize("choice", [path.stem for path in (CONF / "experiment").glob("*.yaml")])
def test_every_experiment_composes(choice):
    config = composed(f"+experiment={choice}")
    assert isinstance(attack_of(config), Attack)


def values_of(override):
    """What is swept over; of an interval its ends."""
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    if override.is_interval_sweep():
        return [str(override.value().start), str(override.value().end)]
    return list(override.sweep_string_iterator())


@pytest.mark.slow
@pytest.mark.parametrize("choice", [path.stem for path in (CONF / "experiment").glob("*.yaml")])
def test_every_choice_that_an_experiment_sweeps_over_composes(choice):
    params = composed(f"+experiment={choice}").hydra.sweeper.params or {}
    for key, values in params.items():
        (swept,) = OverridesParser.create().parse_overrides([f"{key}={values}"])
        for value in values_of(swept):
            config = composed(f"+experiment={choice}", f"{key}={value}")
            assert isinstance(attack_of(config), Attack)
            if key == "defense":
                assert Defense(**build(config.defense)).name == value.strip("[]").replace(",", "+")


@pytest.mark.parametrize("dataset", [path.stem for path in (CONF / "dataset").glob("*.yaml")])
def test_training_and_threat_follow_the_dataset(dataset):
    choices = composed(f"dataset={dataset}").hydra.runtime.choices
    assert choices.train == dataset
    assert choices.threat == f"{dataset}_linf"


def test_defenses_can_be_given_alone_or_as_a_list():
    alone = composed("defense=adversarial_training").defense
    listed = composed("defense=[adversarial_training]").defense
    assert alone == listed
    assert Defense(**build(listed)).name == "adversarial_training"
    assert Defense(**build(composed("defense=[]").defense)).name == "none"


COMMAND = r"(?:python3?|torchrun \S+) -m robustbench_local(?!\.)\b([^`\n]*)"


def commands():
    for page in PAGES:
        for line in page.read_text().replace("\\\n", " ").splitlines():
            for quoted in re.findall(
                r"(?:python3?|torchrun \S+) -m robustbench_local(?!\.)\b([^`\n]*)", line
            ):
                if "own_conf" not in quoted:  # its files are on the page: test_cli.py runs it
                    command = quoted.split("#")[0].strip()
                    yield pytest.param(command, id=f"{page.name}:{quoted.strip()}")


@pytest.mark.parametrize("command", list(commands()))
def test_every_quoted_command_composes(command):
    words = [word for word in shlex.split(command) if not word.startswith("-")]
    parsed = OverridesParser.create().parse_overrides(words)
    first = [
        f"{override.input_line.split('=')[0]}={values_of(override)[0]}"
        if override.is_sweep_override()
        else override.input_line
        for override in parsed
    ]
    assert isinstance(attack_of(composed(*lifted(first))), Attack)


@pytest.mark.parametrize(
    ("words", "norm"),
    [
        (["attack=one_pixel"], "l0"),
        (["attack=one_pixel", "dataset=cifar10"], "l0"),
        (["attack=one_pixel", "threat=mnist_linf"], "linf"),
        (["+experiment=pgd", "attack=spatial"], "spatial"),
        (["attack=sparse_l1_descent"], "l1"),
        (["attack=pgd"], "linf"),
        (["attack=pgd", "threat=mnist_l0"], "l0"),
    ],
)
def test_an_attack_brings_the_only_threat_it_serves_unless_one_is_chosen(words, norm):
    assert composed(*words).threat.norm == norm


def test_the_number_of_draws_is_left_to_the_victim():
    config = composed("attack=standard", "attack.parts.apgd_ce.eot_samples=7")
    for samples in (1, 20):
        attack = attack_of(config, samples)
        assert attack.eot_samples == attack.parts["apgd_dlr"].eot_samples == samples
        assert attack.parts["apgd_ce"].eot_samples == 7


def selftests():
    pages = [*(page.read_text() for page in PAGES), HELP]
    for line in "\n".join(pages).replace("\\\n", " ").splitlines():
        for quoted in re.findall(r"python3? -m robustbench_local\.selftest\b([^`\n]*)", line):
            if "own_conf" not in quoted:
                yield quoted.split("#")[0].strip()


@pytest.mark.parametrize("command", sorted(set(selftests())))
def test_every_quoted_selftest_composes(command):
    words = [word for word in shlex.split(command) if "mine" not in word]
    if "--config-dir" in words:
        del words[words.index("--config-dir") :]
    assert "_target_" in composed_selftest(words).attack


def looks_at_results():
    pages = [*PAGES, ROOT / "results" / "README.md"]
    text = "\n".join(page.read_text() for page in pages).replace("\\\n", " ")
    for line in text.splitlines():
        for quoted in re.findall(r"python3? -m robustbench_local\.results\b([^`\n]*)", line):
            yield quoted.split("#")[0].split(" |")[0].strip()


@pytest.mark.parametrize("command", sorted(set(looks_at_results())))
def test_every_quoted_look_at_results_is_read(command):
    wanted = next((word for word in shlex.split(command) if not word.startswith("-")), None)
    assert vars(parser().parse_args(shlex.split(command)))["command"] == wanted


@pytest.mark.parametrize("library", ["torchattacks", "art"])
def test_hyper_parameters_of_other_libraries_need_no_plus(library):
    name, key = {"torchattacks": ("PGD", "steps"), "art": ("HopSkipJump", "max_iter")}[library]
    words = [f"attack={library}", f"attack.name={name}", f"attack.kwargs.{key}=7", "seed=3"]
    assert lifted(words) == [*words[:2], f"++attack.kwargs.{key}=7", "seed=3"]
    attack = attack_of(composed(*lifted(words)))
    assert (attack.name, dict(attack.kwargs), attack.seed) == (name, {key: 7}, 3)
    assert type(attack.kwargs) is dict


def test_parameters_of_arts_preprocessors_need_no_plus():
    words = ["defense=art", "defense.wrap.art.name=FeatureSqueezing"]
    words += ["defense.wrap.art.kwargs.bit_depth=3"]
    part = build(composed(*lifted(words)).defense)["wrap"]["art"]
    x = torch.linspace(0, 1, 64).view(1, 1, 8, 8)
    assert torch.allclose(part(x), (x * 7).round() / 7)


def test_the_readme_quotes_commands():
    assert len(list(commands())) >= 10


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("force=true --config-dir conf x=1", "--config-dir conf force=true x=1"),
        ("attack=a,b -m seed=1", "-m attack=a,b seed=1"),
        ("~model.x -cd a=b --cfg job +x=1 --resolve", "-cd a=b --cfg job --resolve ~model.x +x=1"),
        ("x=1 --info y=2", "--info x=1 y=2"),
        ("x=1 --info defaults y=2", "--info defaults x=1 y=2"),
        ("x=1 --config-dir=conf y=2 --config-dir", "--config-dir=conf --config-dir x=1 y=2"),
        ("attack x=1", "attack x=1"),
        ("x=1 --info --config-dir conf", "--info --config-dir conf x=1"),
    ],
)
def test_options_may_stand_anywhere(typed, meant):
    assert options_first(typed.split()) == meant.split()
