"""The fit of a log ratio over sigma: smooth, robust to few points, the same everywhere."""

import pytest
import torch

from tempolora.train.normaliser import SigmaFit


def fitted(sigma, ratio):
    fit = SigmaFit()
    fit.add(torch.as_tensor(sigma), torch.as_tensor(ratio))
    return fit


def test_a_quadratic_in_log_sigma_is_recovered_from_many_points():
    sigma = torch.linspace(0.05, 0.95, 400)
    truth = 1 - 0.5 * sigma.log() + 0.2 * sigma.log() ** 2
    noisy = truth + 0.1 * torch.randn(400, generator=torch.Generator().manual_seed(0))
    fit = fitted(sigma, noisy)
    asked = torch.tensor([0.1, 0.5, 0.9])
    expected = 1 - 0.5 * asked.log() + 0.2 * asked.log() ** 2
    assert torch.allclose(fit(asked), expected, atol=0.05)


def test_one_point_is_a_constant_and_a_few_hardly_bend():
    assert fitted([0.9], [2.0])(torch.tensor([0.88, 0.99])).tolist() == pytest.approx([2.0, 2.0])
    three = fitted([0.90, 0.92, 0.94], [0.0, 1.0, 0.0])(torch.linspace(0.88, 0.99, 50))
    assert three.min() > -0.5 and three.max() < 1


def test_beyond_the_sigmas_seen_it_stays_where_it_was():
    fit = fitted([0.2, 0.3, 0.4, 0.5], [1.0, 2.0, 3.0, 4.0])
    asked = torch.tensor([0.0, 0.1, 0.2, 0.5, 1.0])
    low, lower, edge, top, beyond = fit(asked).tolist()
    assert low == lower == edge and top == beyond


def test_what_is_not_finite_is_left_out_and_nothing_is_no_answer():
    fit = fitted([0.5, 0.5], [torch.inf, 1.0])
    assert fit.points == [[0.5, 1.0]]
    with pytest.raises(ValueError, match="nothing was observed"):
        SigmaFit()(torch.tensor([0.5]))


def test_points_are_all_there_is_to_keep():
    fit = fitted([0.2, 0.6, 0.9], [1.0, 0.5, 0.7])
    again = SigmaFit(fit.points)
    asked = torch.rand(10)
    assert torch.equal(fit(asked), again(asked))
