"""What jobs on a cluster typically do, so that the classes they need are in the archive."""

import sys
from collections.abc import Iterator

import pyarrow as pa
from pyspark import BarrierTaskContext
from pyspark.sql import SparkSession
from pyspark.sql import functions as f


def doubled(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        numbers = batch.column("id").to_pylist()
        yield pa.RecordBatch.from_pydict({"id": numbers, "twice": [2 * n for n in numbers]})


def partition(_: Iterator[int]) -> Iterator[int]:
    yield BarrierTaskContext.get().partitionId()


def main() -> None:
    spark = SparkSession.builder.appName("typical").getOrCreate()
    spark.sparkContext.parallelize(range(1), 1).barrier().mapPartitions(partition).collect()
    frame = spark.range(0, 100, 1, 2).mapInArrow(doubled, "id long, twice long")
    frame.write.mode("overwrite").parquet(sys.argv[1])
    read = spark.read.parquet(sys.argv[1])
    read.groupBy((f.col("twice") % 4).alias("rest")).agg(f.count("*"), f.avg("id")).collect()
    rows = [(1, b"x", "a"), (2, b"y", "b")]
    spark.createDataFrame(rows, "n int, b binary, s string").filter("n > 1").collect()
    spark.stop()


if __name__ == "__main__":
    main()
