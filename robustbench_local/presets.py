"""What is in conf/hydra/ under names that Hydra and its plugins have for something else."""

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from robustbench_local.cli_errors import CONF


def prefer_own_presets() -> None:
    """Put our own launchers and our own sweeper, in this process, in the place of others.

    Hydra would merge a launcher of ours with what a plugin registered under its name, with a
    warning, and refuse what the plugin's types do not foresee. The sweeper `planned` takes the
    place of `basic`, which is what runs without a choice: an experiment may choose another one,
    and could not if config.yaml had chosen. The jobs of a sweep get what is registered from here.
    """
    Plugins.instance()  # finds the plugins, which register
    registered = ConfigStore.instance().repo.get("hydra", {}).get("launcher", {})
    for file in (CONF / "hydra" / "launcher").glob("*.yaml"):
        registered.pop(file.name, None)
    planned = OmegaConf.load(CONF / "hydra" / "sweeper" / "planned.yaml")
    ConfigStore.instance().store(group="hydra/sweeper", name="basic", node=planned)
