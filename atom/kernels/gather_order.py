"""In which order a thread gathers the columns of a chunk from shared memory, so that a warp's lanes meet few conflicts.

A permuted row is read by 2-byte loads, 32 lanes at a time. Lanes whose words lie in one of the 32 banks wait for each
other, and with columns as they come the fullest bank of a load serves 3.5 of them. But a thread may take its eight
columns in any order, since they share a scale, and put the eight codes back in place with two byte permutations: then
it is an edge colouring of lanes and banks, and two a bank suffice (262 waits instead of 448 for a row of 4096).
"""

from .producer_config import CHUNK

BANKS, LANES = 32, 32


def gather_orders(columns: list[int], run: int, size: int) -> list[list[int]]:
    """For each chunk of `columns` the places of its eight columns in the order in which to load them.

    columns  that the slots hold, eight a chunk
    run      neighbouring chunks of one thread
    size     bytes of a column
    """
    chunks = len(columns) // CHUNK
    found: list[list[int]] = [[] for _ in range(chunks)]
    for warp in range(0, chunks, LANES * run):
        for j in range(run):
            served = [[0] * BANKS for _ in range(CHUNK)]  # by load and bank
            fullest = [0] * CHUNK
            for chunk in range(warp + j, min(warp + LANES * run, chunks), run):
                banks = [(column * size // 4) % BANKS for column in columns[CHUNK * chunk : CHUNK * (chunk + 1)]]
                free, order = list(range(CHUNK)), [0] * CHUNK
                for place in sorted(range(CHUNK), key=lambda e: -sum(load[banks[e]] for load in served)):
                    bank = banks[place]
                    load = min(free, key=lambda k: (served[k][bank] >= fullest[k], served[k][bank]))
                    free.remove(load)
                    order[load] = place
                    served[load][bank] += 1
                    fullest[load] = max(fullest[load], served[load][bank])
                found[chunk] = order
    return found


def selector(order: list[int]) -> int:
    """What puts codes loaded in that order back: selectors of prmt for the first and the last four, 16 bits each."""
    return sum(order.index(place) << 4 * place for place in range(CHUNK))
