"""hydra/sweeper=optuna: Hydra's plugin, made to go on where an interrupted search was."""

import warnings
from pathlib import Path
from typing import Any

from hydra_plugins.hydra_optuna_sweeper.optuna_sweeper import OptunaSweeper

from .tracking import say


class OptunaSearch(OptunaSweeper):
    """Counts the trials that the study's storage holds, and takes up again those that were under way."""

    def sweep(self, arguments: list[str]) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        search: Any = self.sweeper
        launch, stop = search.launcher.launch, Path(search.sweep_dir) / "stop"

        def launch_unless_stopped(*args: Any, **kwargs: Any) -> Any:
            returns = launch(*args, **kwargs)
            if stop.exists():
                raise SystemExit(3)  # before the study hears of these trials: the next command takes them up again
            return returns

        search.launcher.launch = launch_unless_stopped
        if search.storage is None:
            super().sweep(arguments)
            return
        directions = search._get_directions()
        study = optuna.create_study(
            study_name=search.study_name, storage=search.storage, directions=directions, load_if_exists=True
        )
        for trial in study.get_trials(deepcopy=False):
            if trial.state.name == "RUNNING":  # when the search was stopped
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                study.enqueue_trial(trial.params)
        done = _finished(study)
        search.n_trials = max(0, search.n_trials - done)
        if search.n_trials:
            super().sweep(arguments)
        else:
            say(f"the study has its {done} trials; more with hydra.sweeper.n_trials=...")
        if len(directions) == 1 and (done := _finished(study)):
            params = " ".join(f"{key}={value}" for key, value in study.best_params.items())
            say(f"best of {done} trials: {study.best_value:.4g} with {params}")


def _finished(study: Any) -> int:
    return sum(trial.state.name == "COMPLETE" for trial in study.get_trials(deepcopy=False))
