"""MLflow as a mirror of the run folders: the files come first, MLflow can be rebuilt from them.

    task            experiment of that name
    sweep           parent run, tagged mad.role=sweep: leaderboard, counts
    run             child run, tagged mad.role=cell and mad.fingerprint, one per experiment
    RunConfig       parameters (optim.lr, and optim.lr_log10 for axes that know no logarithm)
    metrics.jsonl   curves: train/loss, val/token_accuracy, ...
    Result          test/... and total/..., once, at step 0; tags mad.env.*; the dataset's digest
    config.json     artifact config.json; a failed run adds traceback.txt
    figures/        artifacts figures/...
    model.pt        a logged model, on request
    status          running RUNNING, finished and diverged FINISHED, failed FAILED,
                    interrupted KILLED; a run that only waits is not in MLflow yet
    folder of runs  tag mad.owner: a run belongs to the folder it was made in

One process writes at a time, held by a lock beside the store. A call to a server is short, retried
twice, and never waited for by training; workers do not import MLflow, and neither does this package
before it is used. In reading order, each file importing only from those before it:

    records.py      what MLflow is told of a run and a sweep, as pure functions
    stores.py       where MLflow keeps runs: addresses, names of experiments, local databases
    problems.py     what can go wrong, and what it means
    locks.py        who writes a store, which sweeps go on, whose the runs are
    entry.py        one run in MLflow, told only what it has not been told
    experiments.py  a task's experiment, and what is looked at before training
    uploads.py      its files, after the numbers and apart from them
    models.py       a run's model, for `mlflow.pytorch.load_model`
    bridge.py       brings one store up to date from the run folders
    mirror.py       keeps a store up to date while sweeps go on
    page.py         MLflow's page: its server, and the address of an experiment's charts
"""

from mad_efla.tracking.bridge import SyncReport, sync
from mad_efla.tracking.experiments import check
from mad_efla.tracking.mirror import Mirror
from mad_efla.tracking.page import deep_link, ui
from mad_efla.tracking.records import PRIMARY
from mad_efla.tracking.stores import resolve_uri

__all__ = ["PRIMARY", "Mirror", "SyncReport", "check", "deep_link", "resolve_uri", "sync", "ui"]
