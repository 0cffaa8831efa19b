"""Train on one GPU node and apply on all of them; see herbarium.job.

spark-submit /opt/gpupt/classifier/classify.py [--help]
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SPARK_JOBS = Path(os.environ.get("GPUPT_SPARK_JOBS", "/opt/gpupt/spark/jobs"))
sys.path[:0] = [str(HERE), str(SPARK_JOBS)]

from herbarium.job import main  # noqa: E402

sys.exit(main())
