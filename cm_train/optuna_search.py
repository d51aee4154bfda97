"""hydra/sweeper=optuna: Hydra's plugin, made to go on where an interrupted search was."""

import warnings
from pathlib import Path
from typing import Any

import optuna
from hydra.core.plugins import Plugins
from hydra_plugins.hydra_optuna_sweeper.optuna_sweeper import OptunaSweeper
from optuna.trial import TrialState

from .tracking import say

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


class OptunaSearch(OptunaSweeper):
    """Counts the trials that the study's storage holds, and takes up again those that were under way."""

    def sweep(self, arguments: list[str]) -> None:
        search: Any = self.sweeper
        if search.storage is not None:
            done = self._take_up(search)
            search.n_trials = max(0, search.n_trials - done)
            if not search.n_trials:
                say(f"the study has its {done} trials; more with hydra.sweeper.n_trials=...")
        launch, stop = search.launcher.launch, Path(search.sweep_dir) / "stop"

        def launch_unless_stopped(*args: Any, **kwargs: Any) -> Any:
            returns = launch(*args, **kwargs)
            if stop.exists():
                raise SystemExit(3)  # before the study hears of these trials: the next command takes them up again
            return returns

        search.launcher.launch = launch_unless_stopped
        super().sweep(arguments)
        study = optuna.load_study(search.study_name, search.storage) if search.storage is not None else None
        if study is not None:
            say(f"best of {_finished(study)} trials: {study.best_value:.4g} with {_shown(study.best_params)}")

    @staticmethod
    def _take_up(search: Any) -> int:
        """Queue what was under way when the search was stopped; the number of trials that finished."""
        directions = search._get_directions()
        study = optuna.create_study(search.storage, study_name=search.study_name, directions=directions,
                                    load_if_exists=True)  # fmt: skip
        for trial in study.get_trials(deepcopy=False):
            if trial.state == TrialState.RUNNING:
                study.tell(trial.number, state=TrialState.FAIL)
                study.enqueue_trial(trial.params)
        return _finished(study)


def _finished(study: optuna.Study) -> int:
    return sum(trial.state == TrialState.COMPLETE for trial in study.get_trials(deepcopy=False))


def _shown(params: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in params.items())


OptunaSearch.__module__ = "hydra_plugins.optuna_search"  # see sweeps.py
Plugins.instance().register(OptunaSearch)
