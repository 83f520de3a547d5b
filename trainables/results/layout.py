"""Names of the files and folders of a study. Standard library only."""

from __future__ import annotations

STUDY_FILE = "study.yaml"
MANIFEST = "manifest.json"
JOURNAL = "ledger.jsonl"
STORAGE = "optuna.db"
LOG_FILE = "study.log"
LOCK_FILE = ".driver.lock"
DRIVER = "driver.json"
"""In a store: the object that says which driver is at work."""

TRIALS = "trials.parquet"
EPOCHS = "epochs.parquet"
ATTEMPTS = "attempts.parquet"
STUDY_TABLES = (TRIALS, EPOCHS, ATTEMPTS)
"""Made from the journal; what follows is made by other commands."""
BENCH_FILE = "bench.parquet"
EVALUATIONS_FILE = "evaluations.parquet"
OPTUNA_FILE = "tables/importances_optuna.parquet"
"""Optuna's importances, which need Optuna to compute and nothing to read."""

SIGNALS = "signals"
SAMPLES = "samples"
MODELS = "models"
OUTPUT = "output"
"""What scripts print, NAME.log, and a folder per trial for their own files."""
CHECKPOINTS = "tune"
"""Ray Tune's folder of a study."""
CLAIMS = f"{CHECKPOINTS}/claims"
"""One file per trial: which worker writes the trial's files."""
CODE = "code"
"""Copies of the user's own code that a study runs."""
TABLES = "tables"
FIGURES = "figures"
OWN_FOLDERS = (TABLES, FIGURES)
"""What `mebm tables` and `mebm figures` leave in a folder of studies."""
