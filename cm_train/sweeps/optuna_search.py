"""hydra/sweeper=optuna: Hydra's plugin, made to go on where an interrupted search was."""

import warnings
from pathlib import Path
from typing import Any

from hydra_plugins.hydra_optuna_sweeper.optuna_sweeper import OptunaSweeper

from ..core.errors import InputError
from ..core.terminal import say


class OptunaSearch(OptunaSweeper):
    """Counts the trials that the study's storage holds, and takes up again those that were under way."""

    def sweep(self, arguments: list[str]) -> None:
        """Run the trials that are left, and say which was best. Raises InputError."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        search: Any = self.sweeper
        directions = search._get_directions()
        if len(directions) != 1 or directions[0] not in ("minimize", "maximize"):
            raise InputError("a search has one direction", str(directions), "minimize, maximize")
        if search.config.objective_metric is None:
            raise InputError("a search needs a number to look at", fix="set objective_metric=agreement or =loss")
        self._run_distinct_trials_until_stopped(search)
        if search.storage is None:
            self._sweep(arguments)
            return
        study = self._study(search, directions)
        for trial in study.get_trials(deepcopy=False):
            if trial.state.name == "RUNNING":  # when the search was stopped
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                study.enqueue_trial(trial.params)
        done = _finished(study)
        search.n_trials = max(0, search.n_trials - done)
        if search.n_trials:
            self._sweep(arguments)
        else:
            say(f"the study has its {done} trials; more with hydra.sweeper.n_trials=...")
        if done := _finished(study):
            params = " ".join(f"{key}={value}" for key, value in study.best_params.items())
            say(f"best of {done} trials: {study.best_value:.4g} with {params}")

    def _sweep(self, arguments: list[str]) -> None:
        try:
            super().sweep(arguments)
        except ValueError as error:  # from asking for the best of none
            if "Record does not exist" not in str(error) and "No trials are completed" not in str(error):
                raise
            say("no trial has finished")

    @staticmethod
    def _study(search: Any, directions: list[str]) -> Any:
        import optuna

        try:
            return optuna.create_study(
                study_name=search.study_name, storage=search.storage, directions=directions, load_if_exists=True
            )
        except ValueError as error:
            fix = "give this one a name of its own with hydra.sweeper.study_name=..."
            raise InputError(f"the study in {search.storage} is another: {error}", fix=fix) from None

    @staticmethod
    def _run_distinct_trials_until_stopped(search: Any) -> None:
        """Trials that would be the same run share one; trials of a stopped sweep stay under way in the study."""
        launch, stop = search.launcher.launch, Path(search.sweep_dir) / "stop"

        def launch_distinct(job_overrides: Any, initial_job_idx: int) -> list[Any]:
            keys = [tuple(overrides) for overrides in job_overrides]
            distinct = list(dict.fromkeys(keys))
            returns = dict(zip(distinct, launch(distinct, initial_job_idx=initial_job_idx), strict=True))
            if stop.exists():
                raise SystemExit(3)  # before the study hears of these: the next command takes them up again
            return [returns[key] for key in keys]

        search.launcher.launch = launch_distinct


def _finished(study: Any) -> int:
    return sum(trial.state.name == "COMPLETE" for trial in study.get_trials(deepcopy=False))
