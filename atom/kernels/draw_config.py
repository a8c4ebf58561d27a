"""What the sampler and the kernel that draws agree on: rows of parameters, tiles, the mixing of random bits."""

import math

THREADS = 1024
TILE = 512  # tokens of a first-stage candidate
# Values below the largest that are counted apart. Further below lie only logits so far off (10^19 below one of 10^19,
# 2^127 below one of 2) that they have no mass at any temperature. An odd number for each thread: threads walk through
# bins of their own side by side, and 48 each would meet in two of shared memory's 32 banks.
BINS = 49 * THREADS
FAULTY = -1  # instead of a token id: the logits held no number to choose by

# rows of the parameters, int64 each; from TEMPERATURE on their bits are those of float64
KEY, TOP_K, TEMPERATURE, LOG_MIN_P, TOP_P, GREEDY = 0, 2, 3, 4, 5, 9

# SplitMix64's multipliers as int64; log_exponential's range, see serving/random.py
MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
LOG_RANGE = 52 * math.log(2) + 2e-14
