"""The kinds of faults; a module of its own, as nothing else may be imported before the environment is set."""

# Kinds, and how many of a hundred they are. "ray" and "dvc" start real clusters and interpreters: some ten seconds each.
SHARES = {
    "kill": 20,
    "stop": 8,
    "disk": 16,
    "file limit": 5,
    "moment": 8,
    "child": 8,
    "input": 13,
    "output": 4,
    "work": 9,
    "clock": 3,
    "mlflow": 2,
    "store": 3,
    "ray": 1,
}
