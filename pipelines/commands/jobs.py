"""The jobs: commands that read a configuration file.

Each module has `command(config_path, overrides) -> exit status` and `SECTIONS`, the dataclass of each section it reads.
"""

JOBS = {
    "preprocess": "pipelines.preprocess.run",
    "plan": "pipelines.preprocess.cost",
    "encode": "pipelines.encode.job",
    "train": "pipelines.train.launch",
    "sweep": "pipelines.train.sweep",
    "evaluate": "pipelines.evaluate.job",
}
