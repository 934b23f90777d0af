"""`python -m pipelines.train CONFIG.yaml …`: one rank of a training, as started by torchrun or deepspeed."""

import sys

from pipelines.cli import main

# DeepSpeed's launcher adds --local_rank=N; the rank is read from the environment.
sys.exit(main(["train", *(word for word in sys.argv[1:] if not word.startswith(("--local_rank", "--local-rank")))]))
