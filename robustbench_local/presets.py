"""The launchers of conf/hydra/launcher/, which are called as the plugins call theirs."""

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from robustbench_local.cli_errors import CONF


def prefer_own_presets() -> None:
    """Forget, in this process, what plugins registered under the names of our own files.

    Hydra would merge the two, with a warning, and refuse what the plugin's types do not foresee.
    The jobs of a sweep get what is registered from here.
    """
    Plugins.instance()  # finds the plugins, which register
    registered = ConfigStore.instance().repo.get("hydra", {}).get("launcher", {})
    for file in (CONF / "hydra" / "launcher").glob("*.yaml"):
        registered.pop(file.name, None)
