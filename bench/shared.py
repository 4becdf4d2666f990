"What the benchmarks share: clocks that take turns, and decoding."

import resource
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image


def clock():
    """Seconds passed, and those of CPU time used by this process and its finished children: the
    second hardly feels what else runs."""
    use = [resource.getrusage(o) for o in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return np.array([time.perf_counter(), sum(o.ru_utime + o.ru_stime for o in use)])


def alternate(sides, rounds):
    "Seconds (passed, of CPU) of each of `sides` in each of `rounds`, taking turns: rounds x 2"
    times = {k: [] for k in sides}
    for _ in range(rounds):
        for k, f in sides.items():
            start = clock()
            f()
            times[k].append(clock() - start)
    return {k: np.array(v) for k, v in times.items()}


def medians(sides, rounds):
    "Seconds of each of `sides`: medians over rounds in which they take turns"
    return {k: float(np.median(v[:, 0])) for k, v in alternate(sides, rounds).items()}


def rates(counts, times):
    "Images a second, and a second of CPU time, of each side: medians over the rounds"
    speed = {k: counts[k] / np.median(v, 0) for k, v in times.items()}
    return [{k: round(float(v[i])) for k, v in speed.items()} for i in (0, 1)]


def decode(file):
    "The pixels of an image: what reading it costs at least."
    with Image.open(file) as img:
        return np.asarray(img.convert("RGB"))


def decode_all(files, workers):
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(decode, files):
            pass
