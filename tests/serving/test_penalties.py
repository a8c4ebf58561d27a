import torch

from atom.serving.penalties import TokenCounts


def test_penalties_follow_their_definition() -> None:
    """Token by token: repetition over prompt and output, then frequency and presence over the output."""
    torch.manual_seed(0)
    vocab, lanes = 11, torch.tensor([2, 0])
    counts = TokenCounts(3, vocab, torch.device("cpu"))
    tokens = {2: ([1, 1, 2], [2, 3, 3, 3]), 0: ([5], [])}
    for lane, (prompt, output) in tokens.items():
        counts.load(lane, torch.from_numpy(counts.entries(prompt, output)))
    counts.add(lanes, torch.tensor([4, 5]))  # as sampled tokens
    logits = torch.randn(2, vocab) * 3
    presence, frequency, repetition = torch.tensor([0.5, -1.0]), torch.tensor([0.25, 0.7]), torch.tensor([1.3, 0.8])
    got = counts.apply(logits.clone(), lanes, presence, frequency, repetition)
    for row, (lane, new) in enumerate([(2, 4), (0, 5)]):
        prompt, output = tokens[lane][0], [*tokens[lane][1], new]
        for token in range(vocab):
            x = logits[row, token].double()
            if token in prompt or token in output:
                x = x / repetition[row] if x > 0 else x * repetition[row]
            x -= frequency[row] * output.count(token) + presence[row] * (token in output)
            torch.testing.assert_close(got[row, token].double(), x, rtol=1e-5, atol=1e-5)


def test_counts_stop_before_they_overflow() -> None:
    counts = TokenCounts(1, 4, torch.device("cpu"))
    counts.load(0, torch.from_numpy(counts.entries([1], [1] * 40000)))
    lane, token = torch.tensor([0]), torch.tensor([1])
    for _ in range(3):
        counts.add(lane, token)
    one = torch.ones(1)
    got = counts.apply(torch.zeros(1, 4), lane, 0 * one, one, one)
    assert got[0].tolist() == [0, -8191, 0, 0]


def test_forbidden_tokens_stay_forbidden() -> None:
    counts = TokenCounts(1, 3, torch.device("cpu"))
    counts.load(0, torch.from_numpy(counts.entries([0], [1])))
    one = torch.ones(1)
    got = counts.apply(torch.full((1, 3), -torch.inf), torch.tensor([0]), -2 * one, -2 * one, 0.1 * one)
    assert got.tolist() == [[-torch.inf] * 3]
