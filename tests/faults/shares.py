"""Kinds of faults and stages by name; nothing is imported, as the environment has to be set before."""

TRAINING = ("entropy_model", "train_dpar", "train_llamagen")  # stages that train in a process of their own

# Kinds, and how many of a hundred they are. "ray" starts real clusters: some ten seconds each.
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

# What runs only where it is asked for by --kinds: no faults, but what must change nothing; and the DVC of real processes,
# which takes half a minute each, and two nodes in network namespaces, which take a minute each.
APART = {"surroundings": 10, "beside": 5, "dvc": 3, "nodes": 2}
