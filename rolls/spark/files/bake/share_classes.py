#!/usr/bin/python3 -IS
"""Writes the archive of loaded classes that every JVM of Spark maps at its start (OpenJDK:
application class-data sharing).  Loading and verifying some ten thousand classes is most of
what a JVM of Spark does at first, and under emulation that is most of a minute each.

Run in the tree while it is baked: it starts a master, a worker and a job on the loopback of a
network namespace of its own, notes the classes they load, and dumps those into one archive.

The archive fits a JVM only with the very same class path.  Spark's is ``jars/*``, which the
launcher expands in the order of the directory: another order on another file system.  So
``jars/`` gets a single file, whose manifest names all the others in order.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile

HOME = "/opt/gpupt/spark/home"
ARCHIVE = "/opt/gpupt/spark/classes.jsa"
PYTHON = "/opt/gpupt/env/bin/python"
CLASS_PATH_JAR = "gpupt-classpath.jar"
# No settings' folder on the class path: a JVM shares nothing when one holds a file.
NO_FOLDER = "/nonexistent"
FLAGS = ["-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
JOB = os.path.join(os.path.dirname(os.path.abspath(__file__)), "typical_job.py")
DEADLINE = 600


def gather_jars():
    """Leave one file in jars/ whose manifest names all that were there; once is enough."""
    pyspark = os.path.realpath(HOME)
    jars, gathered = os.path.join(pyspark, "jars"), os.path.join(pyspark, "all-jars")
    if not os.path.isdir(gathered):
        os.rename(jars, gathered)
        os.mkdir(jars, 0o755)
    names = sorted(name for name in os.listdir(gathered) if name.endswith(".jar"))
    line = "Class-Path: " + " ".join(f"../all-jars/{name}" for name in names)
    lines = ["Manifest-Version: 1.0"]
    while line:  # a manifest's lines hold 72 bytes; the next begins with a space
        lines.append(line[:70])
        line = " " + line[70:] if line[70:] else ""
    with zipfile.ZipFile(os.path.join(jars, CLASS_PATH_JAR), "w") as archive:
        entry = zipfile.ZipInfo("META-INF/MANIFEST.MF", (1980, 1, 1, 0, 0, 0))
        archive.writestr(entry, "\r\n".join(lines) + "\r\n\r\n")


def note_classes(folder):
    """Run Spark once, each JVM writing down the classes it loads into ``folder``."""

    def list_to(name):
        return f"-XX:DumpLoadedClassList={folder}/{name}.classes"

    path = f"{HOME}/jars/*"
    environment = {
        **os.environ,
        "SPARK_HOME": HOME,
        "SPARK_CONF_DIR": NO_FOLDER,
        "SPARK_SCALA_VERSION": "2.13",
        "SPARK_LOCAL_HOSTNAME": "localhost",
        "SPARK_LAUNCHER_OPTS": " ".join([*FLAGS, list_to("launcher")]),
        "PYSPARK_PYTHON": PYTHON,
        "HOME": folder,
    }
    deploy = "org.apache.spark.deploy"
    master = ["java", *FLAGS, list_to("master"), "-cp", path, f"{deploy}.master.Master"]
    master += ["--host", "localhost", "--port", "7077", "--webui-port", "8080"]
    worker = ["java", *FLAGS, list_to("worker"), "-cp", path, f"{deploy}.worker.Worker"]
    worker += ["--host", "localhost", "--cores", "1", "--memory", "1g"]
    worker += ["--work-dir", f"{folder}/work", "spark://localhost:7077"]
    submit = [f"{HOME}/bin/spark-submit", "--master", "spark://localhost:7077"]
    for setting in (
        "spark.ui.enabled=false",
        "spark.driver.memory=512m",
        "spark.executor.memory=512m",
        f"spark.driver.extraJavaOptions={' '.join([*FLAGS, list_to('driver')])}",
        f"spark.executor.extraJavaOptions={' '.join([*FLAGS, list_to('executor')])}",
    ):
        submit += ["--conf", setting]
    running = []
    with open(f"{folder}/log", "w") as log:
        try:
            where = {"env": environment, "cwd": folder, "stdout": log, "stderr": log}
            running.append(subprocess.Popen(master, **where))
            await_answer("the master", lambda: listens(7077))
            running.append(subprocess.Popen(worker, **where))
            await_answer("the worker", registered)
            job = [*submit, JOB, f"{folder}/job"]
            subprocess.run(job, **where, check=True, timeout=DEADLINE)
            time.sleep(2)  # the executor writes its list as it ends, after the driver
        finally:
            for program in reversed(running):
                program.send_signal(signal.SIGTERM)
            for program in running:
                program.wait(60)


def await_answer(what, ask):
    """Ask five times a second until the answer is yes; ends this after the deadline."""
    end = time.monotonic() + DEADLINE
    while True:
        try:
            if ask():
                return
        except OSError:
            pass  # no one listens yet
        if time.monotonic() > end:
            raise SystemExit(f"{what} did not come within {DEADLINE} s")
        time.sleep(0.2)


def listens(port):
    socket.create_connection(("localhost", port), 5).close()
    return True


def registered():
    """Whether the master knows a living worker."""
    with socket.create_connection(("localhost", 8080), 30) as link:
        link.sendall(b"GET /json/ HTTP/1.0\r\n\r\n")
        answer = b"".join(iter(lambda: link.recv(65536), b""))
    return b"ALIVE" in answer.partition(b'"workers"')[2].partition(b'"aliveworkers"')[0]


def merge(folder):
    """One list of all; classes of loaders of their own are left out, their numbers clash."""
    found = set()
    names = [name for name in os.listdir(folder) if name.endswith(".classes")]
    if len(names) < 5:
        raise SystemExit(f"not every JVM noted its classes: {sorted(names)}")
    for name in names:
        with open(os.path.join(folder, name)) as file:
            for line in file:
                if not line.startswith("#") and " source:" not in line:
                    found.add(line.rstrip("\n").partition(" id: ")[0])
    merged = os.path.join(folder, "merged")
    with open(merged, "w") as file:
        file.writelines(f"{line}\n" for line in sorted(found))
    return merged


def dump(merged):
    jar = f"{HOME}/jars/{CLASS_PATH_JAR}"
    words = ["java", "-Xshare:dump", f"-XX:SharedClassListFile={merged}"]
    words += [f"-XX:SharedArchiveFile={ARCHIVE}", "-Xlog:cds=off", "-Xlog:cds*=off", "-cp", jar]
    subprocess.run(words, check=True, timeout=DEADLINE)
    # -Xshare:on fails where auto would silently do without the archive.
    words = ["java", "-Xshare:on", f"-XX:SharedArchiveFile={ARCHIVE}", "-cp"]
    words += [f"{NO_FOLDER}/:{HOME}/jars/*", "org.apache.spark.deploy.SparkSubmit", "--version"]
    subprocess.run(words, check=True, timeout=DEADLINE, stdout=subprocess.DEVNULL)
    os.chmod(ARCHIVE, 0o644)


def main():
    if sys.argv[1:] != ["inside"]:
        gather_jars()
        again = [sys.executable, "-IS", os.path.abspath(__file__), "inside"]
        return subprocess.run(["unshare", "--net", "--uts", *again]).returncode
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    socket.sethostname("localhost")
    folder = tempfile.mkdtemp(prefix="gpupt-classes-")
    try:
        note_classes(folder)
        dump(merge(folder))
    except (subprocess.SubprocessError, SystemExit):
        with open(f"{folder}/log", errors="replace") as log:
            sys.stderr.writelines(log.readlines()[-30:])
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


sys.exit(main())
