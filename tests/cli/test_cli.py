"""What a user types and what comes back."""

import json
import re
import resource
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console
from safetensors.torch import save_file

from robustbench_local.__main__ import main
from robustbench_local.results.one import show_record
from robustbench_local.selftest.__main__ import main as run_selftest
from robustbench_local.sweep import Compare

ROOT = Path(__file__).parents[2]


@dataclass
class Finished:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Call `cli("+experiment=smoke", ...)` in an empty folder; gives exit code and output."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["robustbench_local", *words])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
            if isinstance(code, str):  # as the interpreter does
                print(code, file=sys.stderr)
                code = 1
        captured = capsys.readouterr()
        return Finished(code or 0, captured.out, captured.err)

    return call


QUICK = ("+experiment=smoke", "model.width=4", "model.hidden=16", "train.epochs=1")


def files(folder="."):
    """Every file below a folder with its content, but for locks, which stay empty."""
    return {
        str(path): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }


def records():
    return {
        path.stem: json.loads(path.read_text()) for path in Path("results/records").glob("*.json")
    }


def test_a_run_leaves_a_table_a_record_and_the_leaderboard(cli):
    finished = cli(*QUICK)
    assert finished.code == 0
    ((run_id, record),) = records().items()
    for shown in ("clean", "robust", "95% interval", "attack s", "mnist-embedded5k", run_id):
        assert shown in finished.out
    assert "EMBEDDED SUBSET" in finished.out
    examples = np.load(f"results/records/{run_id}.npz")
    clean, robust = examples["clean_correct"], examples["robust_correct"]
    assert record["n"] == len(clean) == 100
    assert record["clean_accuracy"]["value"] == clean.mean()
    assert record["robust_accuracy"]["value"] == robust.mean()
    assert record["attack_success_rate"] == pytest.approx(1 - robust.sum() / clean.sum())
    assert (robust <= clean).all()
    assert examples["size"].max() <= 0.3 + 1e-6
    assert record["config"]["attack"]["steps"] == 40
    for key in ("device", "threads", "packages", "git_commit", "git_dirty", "python"):
        assert key in record["environment"]
    table = pd.read_csv("results/leaderboard.csv")
    assert table.loc[0, "worst_case"] == robust.mean()
    assert table.loc[0, "run_ids"] == run_id
    # Nothing beside what the settings name.
    assert sorted(path.name for path in Path().iterdir()) == ["cache", "results"]


def test_the_same_run_is_shown_from_its_record(cli):
    cli(*QUICK)
    before = files()
    started = time.process_time()  # not the clock on the wall: other tests share the cores
    again = cli(*QUICK)
    assert time.process_time() - started < 5
    assert again.code == 0
    assert "recorded before" in again.out
    assert files() == before


def test_forced_runs_give_the_same_numbers(cli):
    cli(*QUICK)
    ((run_id, first),) = records().items()
    outcomes = files("results")[f"results/records/{run_id}.npz"]
    assert cli(*QUICK, "force=true").code == 0
    ((again, second),) = records().items()
    assert again == run_id
    assert files("results")[f"results/records/{run_id}.npz"] == outcomes
    for key in ("seconds", "finished", "checksum"):
        first.pop(key), second.pop(key)
    first["config"].pop("force"), second["config"].pop("force")
    assert first == second


def test_epsilon_and_attack_train_nothing_again(cli):
    cli(*QUICK, "defense=adversarial_training")
    trained = files("cache/weights")
    cli(*QUICK, "defense=adversarial_training", "threat.epsilon=0.1")
    cli(*QUICK, "defense=adversarial_training", "attack=fgsm")
    cli(*QUICK, "defense=adversarial_training", "threat=mnist_l2")
    assert files("cache/weights") == trained
    assert len(records()) == 4
    assert len({record["weights"]["sha256"] for record in records().values()}) == 1


def test_the_training_budget_does_not_touch_undefended_weights(cli):
    cli(*QUICK)
    trained = files("cache/weights")
    cli(*QUICK, "train.threat.epsilon=0.1", "train.adversarial_steps=7")
    assert files("cache/weights") == trained
    cli(*QUICK, "seed=1")
    assert len(files("cache/weights")) == 2 * len(trained)


def test_a_sweep_makes_one_line_per_row_and_a_column_per_attack(cli):
    finished = cli("-m", *QUICK, "attack=noise,fgsm", "threat.epsilon=0.1,26/255", "attack.seed=0")
    assert finished.code == 0
    table = pd.read_csv("results/leaderboard.csv")
    assert table["epsilon"].tolist() == [0.1, 26 / 255] or table["epsilon"].tolist() == [
        26 / 255,
        0.1,
    ]
    assert table[["worst_case", "worst_case_low", "n"]].notna().all(axis=None)
    worst = table[[c for c in table if c.startswith(("noise", "fgsm")) and "_" not in c[-5:]]]
    assert len(table) == 2
    assert (table["worst_case"] <= worst.min(axis=1) + 1e-12).all()


def progress(finished):
    """The lines of a sweep that tell of one run each: place, name, figures."""
    found = re.findall(r"^ *(\d+) of (\d+)  (.*?): (.*)$", finished.out, re.M)
    return [(int(place), int(of), name, told) for place, of, name, told in found]


def test_runs_of_a_sweep_are_numbered_and_share_what_is_said_of_the_data(cli):
    words = ("-m", *QUICK, "attack=noise,fgsm", "threat.epsilon=0.1,26/255", "attack.seed=0")
    finished = cli(*words)
    assert [line[:3] for line in progress(finished)] == [
        (place, 4, f"{attack}, epsilon={radius}")
        for place, (attack, radius) in enumerate(
            [(attack, radius) for attack in ("noise", "fgsm") for radius in ("0.1", "26/255")], 1
        )
    ]
    lines = finished.out.splitlines()
    assert lines[0] == "4 runs, 0 of them recorded already"
    assert lines[1] == "those to run share 1 trained network, 0 of them in the cache"
    assert "no estimate of the time" in lines[2]
    for said in ("EMBEDDED SUBSET", "note subset", "note provisional"):
        assert sum(said in line for line in lines) == 1
    shown = {name: told for _, _, name, told in progress(finished)}
    for record in records().values():
        radius = "0.1" if record["config"]["threat"]["epsilon"] == 0.1 else "26/255"
        told = shown[f"{record['labels']['attack'].split('-')[0]}, epsilon={radius}"]
        clean, robust = record["clean_accuracy"], record["robust_accuracy"]
        assert told.startswith(
            f"clean {100 * clean['value']:.1f}, robust {100 * robust['value']:.1f} "
            f"({100 * robust['low']:.1f} - {100 * robust['high']:.1f}), n 100, "
        )
    assert progress(cli(*QUICK)) == []


def test_a_sweep_runs_nothing_that_is_recorded_and_compares_it_all(cli):
    words = ("-m", *QUICK, "attack=noise,fgsm", "threat.epsilon=0.1,0.2", "attack.seed=0")
    cli(*QUICK, "attack=fgsm", "threat.epsilon=0.2", "attack.seed=0")
    assert [line[:3] for line in progress(cli(*words))] == [
        (2, 4, "noise, epsilon=0.1"), (3, 4, "noise, epsilon=0.2"), (4, 4, "fgsm, epsilon=0.1"),
    ]  # fmt: skip
    before = files("results/records")
    again = cli(*words)
    assert again.out.splitlines()[0] == "4 runs, 4 of them recorded already"
    assert progress(again) == [] and "robust accuracy in %" in again.out
    assert files("results/records") == before
    more = cli(*words, "seed=0,1")
    assert "about" in more.out.splitlines()[2]
    assert "2 of 4 have earlier runs of the same attack" not in more.out
    assert not list(Path("cache/sweeps").iterdir())


def test_a_sweep_says_what_went_wrong_in_a_training(cli):
    words = ("-m", *QUICK, "attack=noise,fgsm", "train.learning_rate=1e-9")
    out = cli(*words).out
    assert out.count("validation_at_chance: ") == 1  # once, of both runs


def test_runs_that_come_to_the_same_are_run_once(cli):
    done = cli(
        "-m", *QUICK, "attack=noise", "threat.epsilon=26/255,0.1", "awareness=oblivious,adaptive"
    )
    assert [of for _, of, _, _ in progress(done)] == [2, 2]
    assert len(records()) == 2


def test_a_sweeper_that_searches_has_no_total(capsys):
    """Hydra's other sweepers decide on the way how many runs there are."""
    compare = Compare()
    sweeper = {"_target_": "hydra_plugins.search.Sweeper", "params": {"x": "interval(0,1)"}}
    compare.on_multirun_start(OmegaConf.create({"hydra": {"sweeper": sweeper}}))
    job = {"job": {"num": 2}, "overrides": {"task": ["x=0.5"]}}
    compare.on_job_start(OmegaConf.create({"hydra": job}))
    assert capsys.readouterr().out.strip() == "run 3: x=0.5"


def test_a_sweep_of_an_experiment_is_counted_with_what_overrides_it(cli):
    Path("mine/experiment").mkdir(parents=True)
    Path("mine/experiment/several.yaml").write_text(
        "# @package _global_\ndefaults: [smoke]\nhydra:\n  mode: MULTIRUN\n"
        "  sweeper:\n    params: {attack: 'noise,fgsm,pgd', seed: '0,1'}\n"
    )
    words = ("--config-dir", "mine", "+experiment=several", *QUICK[1:], "seed=3")

    def told(*more):
        return [line[:3] for line in progress(cli(*words, *more))]

    assert told("attack=noise,fgsm") == [(1, 2, "noise"), (2, 2, "fgsm")]
    alone = cli(*words, "attack=glob(noi*)")
    assert progress(alone) == [] and "recorded before" in alone.out  # one run is no sweep
    assert told("attack=glob(*gsm)") == [(2, 2, "mi_fgsm")]


def test_a_list_of_epsilons_is_a_curve_of_records_and_a_picture(cli):
    finished = cli(*QUICK, "threat.epsilon=[26/255,0,0.3]", "attack=fgsm")
    assert finished.code == 0
    single = {record["config"]["threat"]["epsilon"]: record for record in records().values()}
    assert sorted(single) == [0, 26 / 255, 0.3]
    accuracies = [single[radius]["robust_accuracy"]["value"] for radius in sorted(single)]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] == single[0]["clean_accuracy"]["value"] > accuracies[2]
    for radius, point in single.items():
        arrays = np.load(f"results/records/{point['run_id']}.npz")
        broken = arrays["clean_correct"] > arrays["robust_correct"]
        told = point["perturbation"]
        assert told["images"] == broken.sum()
        if radius:
            assert 0 < told["median"] == np.median(arrays["size"][broken]) <= radius + 1e-6
        else:
            assert told["median"] is None
    assert len({record["weights"]["sha256"] for record in single.values()}) == 1
    (picture,) = Path("results/curves").iterdir()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.name in finished.out
    # A point of a curve is the run at that epsilon alone, however written; only a new one is run.
    for written in ("0.3", "3/10"):
        assert "recorded before" in cli(*QUICK, f"threat.epsilon={written}", "attack=fgsm").out
    assert "2 of 3 recorded before" in cli(
        *QUICK, "threat.epsilon=[0.1,0.3,26/255]", "attack=fgsm"
    ).out  # fmt: skip
    assert len(records()) == 4


def test_a_targeted_attack_reports_how_often_it_got_there(cli):
    finished = cli(*QUICK, "attack.target=next")
    assert finished.code == 0
    ((run_id, record),) = records().items()
    arrays = np.load(f"results/records/{run_id}.npz")
    assert (arrays["target"] == (arrays["labels"] + 1) % 10).all()
    reached = (arrays["adversarial_prediction"] == arrays["target"])[arrays["attacked"]].mean()
    assert record["target_success_rate"] == reached > 0.5
    assert "reached the target class" in finished.out


def test_a_transfer_names_its_sources_and_knows_them_by_content(cli):
    words = (*QUICK, "attack=transfer", "threat.access=labels")
    assert cli(*words, "attack.sources=[seed:5,seed:6]").code == 0
    (record,) = records().values()
    assert record["passes_per_attacked_image"] == {"forward": 0, "backward": 0}
    told = record["attack_report"]["sources"]
    assert [source["name"] for source in told] == ["seed:5", "seed:6"]
    keys = {path.stem for path in Path("cache/weights").glob("*.json")}
    assert keys == {record["weights"]["key"], *(source["key"] for source in told)}
    for name in ("first", "second"):
        source = Path(f"cache/weights/{told[0]['key']}.safetensors")
        Path(f"{name}.safetensors").write_bytes(source.read_bytes())
    assert cli(*words, "attack.sources=[file:first.safetensors]").code == 0
    again = cli(*words, "attack.sources=[file:second.safetensors]")
    assert "recorded before" in again.out
    finished = cli(*words, "attack.sources=[seed:0]")
    assert finished.code == 1
    assert "the weights of the victim itself" in finished.err


def test_a_substitute_reports_its_queries(cli):
    words = (*QUICK, "attack=substitute", "threat.access=labels", "attack.rounds=2")
    few = ("attack.epochs=1", "attack.seeds=20", "attack.inner.samples=1", "attack.inner.noise=0")
    assert cli(*words, *few, "threat.epsilon=[0.1,0.3]").code == 0
    for record in records().values():
        assert record["attack_report"]["queries"] == 40
        assert record["preparation_passes"] == {"forward": 40, "backward": 0}
        assert record["attack_report"]["held_out_images"] == 180
        assert record["attack_report"]["transfer_epsilon"] == 0.3
        assert record["passes_per_attacked_image"]["forward"] == 0
        assert record["seconds"]["preparation"] > 0.01  # the training of the substitute


def test_a_failing_run_does_not_stop_a_sweep(cli):
    finished = cli("-m", *QUICK, "attack=noise", "attack.samples=0,1")
    assert finished.code == 1
    assert "1 of 2 runs failed" in finished.err
    assert "  samples=0: attack.samples=0; expected a whole number" in finished.err
    assert len(records()) == 1
    missing, alone = (line for line in finished.err.splitlines() if "python -m" in line)
    command = alone.partition("python -m robustbench_local ")[2]
    assert "attack.samples=0" in command and "attack.samples=0,1" in missing
    # What is quoted is what failed: put right, it is the one run that was missing.
    done = cli(*shlex.split(command.replace("attack.samples=0", "attack.samples=2")))
    assert done.code == 0 and len(records()) == 2


FAILING = """
from robustbench_local.defenses import Preprocess

class Failing(Preprocess):
    def __init__(self):
        raise RuntimeError("of my own")

    def transform(self, x):
        return x
"""


def test_an_exception_in_a_class_of_ones_own_ends_its_run_and_not_the_sweep(cli):
    Path("failing.py").write_text(FAILING)
    Path("own/defense").mkdir(parents=True)
    Path("own/defense/failing.yaml").write_text("wrap: {failing: {_target_: failing.Failing}}\n")
    words = ("--config-dir", "own", *QUICK, "attack=noise,fgsm")
    try:
        done = cli("-m", *words, "defense=failing,none")
        assert done.code == 1
        assert done.err.count("Traceback") == 2
        for attack in ("noise", "fgsm"):
            assert f"  failing, {attack}: RuntimeError: of my own" in done.err.splitlines()
        assert len(records()) == 2 and "worst case" in done.out.replace("\n", " ")
        with pytest.raises(RuntimeError, match="of my own"):  # alone it keeps its traceback
            cli("--config-dir", "own", *QUICK, "defense=failing")
    finally:
        sys.modules.pop("failing", None)


def test_a_sweep_over_nothing_is_an_error(cli):
    done = cli("-m", "+experiment=smoke", "attack=glob(zzz*)")
    assert done.code == 1
    assert done.err.startswith("error: attack is to take every value that a pattern matches")


def test_a_mistake_among_files_of_ones_own_is_told_with_their_names(cli):
    Path("own/attack").mkdir(parents=True)
    Path("own/attack/mine.yaml").write_text(
        "_target_: robustbench_local.attacks.MIFGSM\nseed: 0\nmomentum: 1.0\n"
    )
    Path("own/defense").mkdir()
    Path("own/defense/posterize.yaml").write_text("wrap: {}\n")
    words = ("--config-dir", "own")
    assert "type attack.momentum=VALUE" in cli(*words, "attack=mine", "attack.momentun=2").err
    assert "type defense=posterize" in cli("--config-dir=own", "defense=[jpeg,posterise]").err


BAD = {
    "attack=pgdd": "attack=pgdd does not exist; expected one of",
    "attack=PGD": "type attack=pgd",
    "defense=[jpeg,qqq]": "type defense=NAME",
    "--experiment=pgd": "is no option; settings have no dashes: type +experiment=pgd",
    "attack=pgd --threat.epsilon=0.1": "type threat.epsilon=0.1",
    "+experiment=nope": "experiment=nope does not exist",
    "+experiment=defense": "type +experiment=defenses",
    "experiment=pgd": "nothing is chosen from so far: type +experiment=pgd",
    "defense=[trades,detecter]": "trades, tv: type defense=detector",
    "defense=jpeg quality=3": "prints: type defense.wrap.jpeg.quality=VALUE",
    "zzz=3": "prints: type --cfg job to see them all",
    "model.depth=3": "to see them all, or +model.depth=VALUE to add a new one",
    "train.validation=1": "prints: type dataset.validation_fraction=VALUE",
    "train.validation_attack=1": "prints: type --cfg job to see them all",
    "attack.eps=0.1": "prints: type threat.epsilon=VALUE",
    "attack.stepsize=0.1": "prints: type attack.step_size=VALUE",
    "treat=mnist_linf": "type threat=VALUE",
    "threat.epsilo=0.1": "type threat.epsilon=VALUE",
    "+attack.restart=2": "expected one of seed, steps, step_size, restarts",
    "threat.epsilon=-0.1": "is negative",
    "threat.epsilon=wide": "is not a number",
    "threat.epsilon=[]": "holds no radius",
    "threat.epsilon=[0.1,wide]": "is not a number",
    "attack.target=nearest": "attack.target=nearest",
    "threat.epsilon=8": "is above 1",
    "threat.norm=l0 threat.epsilon=1": "it serves l1, l2, linf: type threat.norm=l1 and",
    "threat.access=labels": "needs access to gradients",
    "threat.query_budget=0": "threat.query_budget=0",
    "threat.query_budget=3": "query_budget=3",
    "attack.steps=0": "attack.steps=0",
    "attack.step_size=nan": "attack.step_size=nan",
    "attack.steps=2.5": "attack.steps=2.5",
    "train.batch_size=64.5": "train.batch_size=64.5",
    "+defense.foo=1": "foo",
    "attack.loss=hinge": "attack.loss=hinge is unknown",
    "attack=transfer attack.sources=[model:3]": "'model:3' cannot be read",
    "attack=substitute attack.query_budget=9": "attack.query_budget=9 does not pay",
    "attack=substitute attack.seeds=9": "attack.seeds=9 is less than the 10 classes",
    "attack=substitute attack.seeds=501 attack.query_budget=600": "held-out images there are",
    "attack.target=10": "attack.target=10 is out of range; expected a class from 0 to 9",
    "attack=one_pixel threat=mnist_l0 threat.access=scores threat.epsilon=785": "have 784 (28x28)",
    "attack=autoattack threat.query_budget=9000": "is not kept by AutoAttack",
    "attack=standard threat.query_budget=9000": "cannot be shared out",
    "seed=abc": "seed=abc",
    "eot.sample=-5": "eot.sample=-5; expected a whole number from 0",
    "batch_size=0": "batch_size=0",
    "device=cuda:7": "device=cuda:7 is not there",
    "dataset.source=files": "paths.data=DIR",
    "dataset.source=web": "dataset.source=",
    "dataset.test_size=0": "dataset.test_size=0",
    "dataset.test_size=5000": "5000|5,000",
    "dataset=npz dataset.path=missing.npz": "missing.npz",
    "dataset=image_folder dataset.path=missing": "missing",
    "model._target_=nowhere.Net": "model._target_=nowhere.Net",
    "+model.depth=3": "depth",
    "model.checkpoint=missing.pt": "missing.pt",
    "train.epochs=0": "train.epochs=0",
    "train.optimizer=adam": "expected one of adamw, sgd",
    "+defense.recipe.mine=1": "defense",
    "paths.results=../taken/results": "type paths.results=DIR",
    "paths.cache=../taken/cache": "type paths.cache=DIR",
    "attack": "attack sets nothing; expected KEY=VALUE: type attack=VALUE",
    "defense=[jpeg": "KEY=[A,B]: type 'defense=[jpeg]'",
    "defense=jpeg]": "KEY=[A,B]: type defense=jpeg",
    "defense=[{a:(1]": "KEY=[A,B]: type 'defense=[{a:(1)}]'",
    "model._target_=a'b": "cannot be read; expected KEY=VALUE, with quotes",
    "attack=art attack.kwargs.foo=1": "summary_writer: type attack.kwargs.KEY=VALUE",
    "attack._target_=robustbench_local.attacks.PDG": "_target_=robustbench_local.attacks.PGD",
    "attack=fgsm,pgd": "expected one: type -m attack=fgsm,pgd for a run with each",
    "defense=jpeg,trades": "for a run with each, or defense=[jpeg,trades] for a list",
    "defense=[jpeg,trades,jpeg]": "jpeg twice; expected each once, since parts are kept by name: "
    "type defense=[jpeg,trades]",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_sentence_and_writes_nothing(cli, words):
    Path("../taken").write_text("a file in the way")
    alone = words.lstrip("+").startswith(("experiment", "dataset="))
    smoke = () if alone else ("+experiment=smoke",)
    finished = cli(*smoke, *words.split())
    assert finished.code not in (0, None)
    lines = [line for line in finished.err.splitlines() if line.strip()]
    assert len(lines) == 1, finished.err
    assert any(part in lines[0] for part in BAD[words].split("|")), lines[0]
    assert "Traceback" not in finished.err
    assert not Path("results").exists()
    # Weights may have been trained before the fault could show.
    if "query_budget=3" not in words:
        assert files() == {}


def test_bad_checkpoints(cli):
    torch.save({"weight": torch.zeros(3)}, "other.pt")
    save_file({"0.weight": torch.zeros(3)}, "other.safetensors")
    torch.save(torch.nn.Linear(2, 2), "code.pt")
    for name, complaint in (
        ("other.pt", "missing"),
        ("other.safetensors", "missing"),
        ("code.pt", "pickled code"),
    ):
        finished = cli("+experiment=smoke", f"model.checkpoint={name}")
        assert finished.code == 1
        assert len(finished.err.strip().splitlines()) == 1
        assert complaint in finished.err
    assert not Path("results").exists()


NET = """
import torch
class Net(torch.nn.Module):
    def __init__(self, num_classes, wrong="nothing"):
        super().__init__()
        self.linear = torch.nn.Linear(784, num_classes - (wrong == "shape"))
        self.wrong = wrong
    def forward(self, x):
        logits = self.linear(x.flatten(1))
        return logits * float("nan") if self.wrong == "number" else logits
"""


def test_a_model_of_ones_own(cli):
    Path("mine.py").write_text(NET)
    mine = ("+experiment=smoke", "model=custom", "model._target_=mine.Net", "train.epochs=1")
    for wrong in ("shape", "number"):
        finished = cli(*mine, f"+model.wrong={wrong}")
        assert finished.code == 1
        assert len(finished.err.strip().splitlines()) == 1
        assert "the model returned" in finished.err
    assert not Path("results").exists()
    assert cli(*mine).code == 0
    (record,) = records().values()
    assert record["labels"]["model"] == "custom-Net"
    assert record["clean_accuracy"]["value"] > 0.5


def test_ones_own_weights_are_evaluated_and_not_trained(cli):
    cli(*QUICK)
    (cached,) = Path("cache/weights").glob("*.safetensors")
    Path("copy.safetensors").write_bytes(cached.read_bytes())
    before = files("cache")
    assert cli(*QUICK, "model.checkpoint=copy.safetensors").code == 0
    assert files("cache") == before
    trained, given = sorted(records().values(), key=lambda record: record["finished"])
    assert given["robust_accuracy"] == trained["robust_accuracy"]
    assert given["clean_accuracy"] == trained["clean_accuracy"]
    assert len(pd.read_csv("results/leaderboard.csv")) == 2


def test_an_edited_model_is_evaluated_again(cli):
    Path("edited.py").write_text(NET)
    words = ("+experiment=smoke", "model=custom", "model._target_=edited.Net", "train.epochs=1")
    assert cli(*words).code == 0
    Path("edited.py").write_text(NET.replace("x.flatten(1)", "x.flatten(1) * 0"))
    sys.modules.pop("edited")
    assert "recorded before" not in cli(*words).out
    assert len(records()) == 2
    assert len(pd.read_csv("results/leaderboard.csv")) == 1


def test_a_random_model_is_judged_on_several_draws_without_saying_so(cli):
    Path("noisy.py").write_text(
        NET.replace("self.linear(x.flatten(1))", "self.linear(x.flatten(1) + torch.randn(784))")
    )
    words = ("+experiment=smoke", "model=custom", "model._target_=noisy.Net", "attack.steps=5")
    assert cli(*words).code == 0
    ((run_id, record),) = records().items()
    # Nothing declares the noise: the attack averages what a random part declares by default.
    assert record["eot"]["samples"] == 20 and record["judge_draws"] == 10
    assert "randomized" not in [flag["name"] for flag in record["flags"]]
    assert cli(*words, "attack.eot_samples=1").code == 0
    single = next(other for name, other in records().items() if name != run_id)
    assert "randomized" in [flag["name"] for flag in single["flags"]]
    correct = np.load(f"results/records/{run_id}.npz")["clean_correct"]
    assert len(set(correct) - {0.0, 1.0}) > 0


@pytest.mark.parametrize("awareness", ["adaptive", "oblivious"])
@pytest.mark.slow
def test_a_point_of_a_curve_of_a_random_victim_is_the_run_alone(cli, own_defenses, awareness):
    """The number of draws that suits one radius says nothing about another."""
    words = (
        *own_defenses, *QUICK, "defense=noisy", "dataset.test_size=60", "judge_draws=4",
        "batch_size=30", "eot.sample=20", "attack.steps=3", f"awareness={awareness}",
    )  # fmt: skip
    assert cli(*words, "threat.epsilon=[0,0.1,0.3]").code == 0
    assert cli(*words, "threat.epsilon=0.3", "paths.results=alone").code == 0
    (file,) = Path("alone/records").glob("*.json")
    alone, point = json.loads(file.read_text()), records()[file.stem]
    measured = (
        "eot", "robust_accuracy", "accuracy_of_draws", "passes_per_attacked_image",
        "preparation_passes", "randomized",
    )  # fmt: skip
    assert {key: alone[key] for key in measured} == {key: point[key] for key in measured}
    arrays = [np.load(f"{folder}/records/{file.stem}.npz") for folder in ("alone", "results")]
    for name in arrays[0]:
        np.testing.assert_array_equal(arrays[0][name], arrays[1][name])
    assert len(alone["accuracy_of_draws"]["robust"]) == 4
    assert arrays[0]["robust_draws"].shape == (60, 4)


def test_a_folder_of_ones_own_configurations(cli):
    Path("mine/attack").mkdir(parents=True)
    Path("mine/attack/gentle.yaml").write_text(
        "_target_: robustbench_local.attacks.PGD\nseed: ${seed}\nsteps: 2\nstep_size: 0.5\n"
    )
    finished = cli(*QUICK, "--config-dir", "mine", "attack=gentle", "attack.steps=3")
    assert finished.code == 0
    assert [record["labels"]["attack"] for record in records().values()] == ["gentle-steps3"]


def run_process(*words, cwd, **keywords):
    return subprocess.run(
        [sys.executable, "-m", "robustbench_local", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        **keywords,
    )


def test_help_is_quick_and_names_groups_and_commands(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = run_process("--help", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert finished.returncode == 0
    # Of the processor, not on the wall: other tests share the cores.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    for group in ("attack", "dataset", "defense", "experiment", "model", "threat", "train"):
        assert group in finished.stdout
    assert finished.stdout.count("python -m robustbench_local") == 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_heavy_libraries_are_not_imported_for_help_nor_unused_ones_for_a_run(tmp_path):
    code = (
        "import sys; sys.argv = ['x', *{words}]\n"
        "from robustbench_local.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('LOADED', *[m for m in ('torch', 'art', 'torchattacks', 'torchvision') "
        "if m in sys.modules])"
    )
    for words, expected in ((["--help"], []), ([*QUICK], ["torch"])):
        finished = subprocess.run(
            [sys.executable, "-c", code.replace("{words}", repr(words))],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert finished.stdout.splitlines()[-1].split() == ["LOADED", *expected], finished.stderr


@pytest.mark.parametrize("words", [["threat.epsilon=-1"], ["attack=pgd", "attack.steps=0"]])
def test_a_mistake_in_the_configuration_waits_for_no_library_but_torch(tmp_path, words):
    heavy = ("art", "kornia", "matplotlib", "pandas", "scipy", "sklearn", "torchattacks",
             "torchvision")  # fmt: skip
    code = (
        f"import sys; sys.argv = ['x', *{words}]\n"
        "from robustbench_local.__main__ import main\n"
        "try: main()\n"
        f"finally: print('LOADED', *[name for name in {heavy} if name in sys.modules])"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert finished.stdout == "LOADED\n"
    assert finished.stderr.startswith("error: ") and finished.stderr.count("\n") == 1


OWN_DEFENSES = """
import torch
from robustbench_local.defenses import Preprocess

class Rounding(Preprocess):
    def transform(self, x):
        return (x * 3).round() / 3

class Noisy(Preprocess):
    randomized = True
    differentiable = True

    def transform(self, x):
        draw = torch.randn(x.shape, generator=self.generator(x.device), device=x.device)
        return (x + 0.2 * draw).clamp(0, 1)
"""


@pytest.fixture
def own_defenses():
    """Two defenses of the user's, in the folder that `cli` runs in."""
    Path("own_defenses.py").write_text(OWN_DEFENSES)
    folder = Path("own/defense")
    folder.mkdir(parents=True)
    for name in ("Rounding", "Noisy"):
        text = f"wrap:\n  {name.lower()}:\n    _target_: own_defenses.{name}\n"
        (folder / f"{name.lower()}.yaml").write_text(text)
    yield "--config-dir", "own"
    sys.modules.pop("own_defenses", None)


@pytest.mark.slow
def test_attacks_that_ignore_a_defense_and_attacks_that_know_it(cli, own_defenses):
    words = ("dataset.test_size=60", "eot.sample=20", "judge_draws=4", "attack=fgsm,pgd")
    done = cli("-m", *own_defenses, *QUICK, *words, "defense=none,rounding,noisy",
               "awareness=oblivious,adaptive")  # fmt: skip
    assert done.code == 0, done.err
    runs = list(records().values())
    by = {
        (r["labels"]["defense"], r["labels"]["attack"], r["labels"]["awareness"]): r for r in runs
    }
    # Without anything in front of the network there is nothing to ignore: one run for both.
    assert {key for key in by if key[0] == "none"} == {
        ("none", "fgsm", "adaptive"), ("none", "pgd", "adaptive"),
    }  # fmt: skip
    assert "awareness=oblivious is the same as adaptive" in done.err
    oblivious, adaptive = (by["rounding", "pgd", a] for a in ("oblivious", "adaptive"))
    assert oblivious["comparability"] != adaptive["comparability"]
    assert oblivious["config"]["attack"]["early_stop"] is False
    assert adaptive["config"]["attack"]["early_stop"] is True
    assert adaptive["robust_accuracy"]["value"] <= oblivious["robust_accuracy"]["value"]
    noisy = by["noisy", "pgd", "adaptive"]
    assert noisy["judge_draws"] == 4
    assert noisy["eot"]["samples"] in (20, 40, 80) and noisy["eot"]["tried"][0]["n"] == 20
    assert noisy["passes_per_attacked_image"]["forward"] >= 40 * noisy["eot"]["samples"]
    blind = by["noisy", "pgd", "oblivious"]
    assert blind["eot"] is None
    assert "randomized" not in {flag["name"] for flag in blind["flags"]}
    table = pd.read_csv(next(Path("results/comparisons").glob("*.csv")))
    assert len(table) == 10 + 3  # runs, and a worst case for each victim
    assert "rounding" in done.out and "worst case" in done.out.replace("\n", " ")
    bad = cli(*QUICK, "awareness=blind")
    assert bad.code == 1 and "expected adaptive" in bad.err


@pytest.mark.slow
def test_an_attack_and_a_defense_of_ones_own_as_readme_says(cli, capsys):
    text = (
        (ROOT / "README.md").read_text("utf-8").split("### An attack and a defense of your own")[1]
    )
    code, attack, defense, commands = re.findall(r"```(?:python|yaml|bash)\n(.*?)```", text, re.S)[
        :4
    ]
    Path("own.py").write_text(code)
    for group, name, yaml in (("attack", "steps", attack), ("defense", "posterize", defense)):
        folder = Path("own_conf", group)
        folder.mkdir(parents=True)
        (folder / f"{name}.yaml").write_text(yaml)
    one, sweep, selftest = (shlex.split(line, comments=True)[2:] for line in commands.splitlines())
    try:
        for words in (one, sweep):
            assert words[0] == "robustbench_local"
            done = cli(*words[1:], *QUICK, "dataset.test_size=60", "train.adversarial_steps=1")
            assert done.code == 0, done.err
        names = {(r["labels"]["defense"], r["labels"]["attack"]) for r in records().values()}
        assert names == {
            ("posterize", "steps-steps20"), ("posterize", "pgd"), ("posterize", "steps"),
            ("adversarial_training+posterize", "pgd"), ("adversarial_training+posterize", "steps"),
        }  # fmt: skip
        assert selftest[0] == "robustbench_local.selftest"
        assert run_selftest(selftest[1:]) == 1
        told = capsys.readouterr().out
        assert "13 passed, 1 failed, 0 skipped" in told and "returned another" in told
    finally:
        sys.modules.pop("own", None)


def test_metrics_are_in_the_record(cli):
    assert cli(*QUICK).code == 0
    (record,) = records().values()
    n, clean = record["n"], record["metrics"]["clean"]
    confusion = np.array(clean["confusion"])
    assert confusion.shape == (10, 10) and confusion.sum() == n
    assert np.trace(confusion) / n == pytest.approx(record["clean_accuracy"]["value"])
    shares = record["metrics"]["robust_accuracy_per_class"]
    assert np.average(shares, weights=confusion.sum(1)) == pytest.approx(
        record["robust_accuracy"]["value"]
    )
    assert 0.8 < clean["macro"]["roc_auc"] <= 1
    arrays = np.load(f"results/records/{record['run_id']}.npz")
    assert arrays["clean_probabilities"].sum(1) == pytest.approx(np.ones(n), abs=5e-3)


def test_under_l2_a_record_says_what_is_proved(cli):
    smoothing = "defense.wrap.randomized_smoothing"
    done = cli(*QUICK, "threat=mnist_l2", "threat.epsilon=0.5", "defense=randomized_smoothing",
               f"{smoothing}.images=8", f"{smoothing}.n=200", "attack=noise")  # fmt: skip
    assert done.code == 0, done.err
    (record,) = records().values()
    proved = record["certified"]
    assert (proved["norm"], proved["images"], proved["n"]) == ("l2", 8, 200)
    shares = [share["value"] for share in proved["radii"].values()]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.3
    assert "certified accuracy" in done.out
    shown = Console(file=StringIO(), width=80)
    show_record(record, shown)
    lines = done.out.splitlines()
    heading = next(line for line in lines if "certified accuracy" in line)
    assert heading in shown.file.getvalue().splitlines()
    assert "predicted:" in shown.file.getvalue()
    done = cli(*QUICK, "defense=randomized_smoothing", "attack=noise")
    assert done.code == 0 and "no certificate under linf" in done.err
    linf = next(r for r in records().values() if r["labels"]["norm"] == "linf")
    assert linf["certified"] is None  # nothing is proved about it


@pytest.mark.slow
def test_a_record_names_what_a_part_of_the_defense_has_learned(cli):
    done = cli(*QUICK, "defense=denoiser", "attack=noise", "defense.wrap.denoiser.width=4",
               "defense.wrap.denoiser.depth=2", "defense.wrap.denoiser.epochs=1")  # fmt: skip
    assert done.code == 0, done.err
    (record,) = records().values()
    learned = record["learned"]["denoiser"]
    assert len(learned["sha256"]) == 64 and learned["sha256"] != record["weights"]["sha256"]
