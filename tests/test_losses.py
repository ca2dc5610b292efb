"""Each loss against numbers worked out by hand."""

import math

import torch

from ftp_lightning import losses


def test_kl_is_that_of_the_teacher_to_the_student():
    teacher, student = torch.tensor([[[0.9, 0.1]]]).log(), torch.tensor([[[0.5, 0.5]]]).log()
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert torch.isclose(losses.kl_per_token(teacher, student + 3), torch.tensor(expected))
    backwards = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert torch.isclose(losses.kl_per_token(student, teacher), torch.tensor(backwards))


def test_distillation_is_relative():
    teacher = torch.tensor([[[1.0, 2.0, 2.0]]])
    assert losses.distillation_loss(teacher, teacher) == 0
    assert torch.isclose(losses.distillation_loss(teacher + 1, teacher), torch.tensor(1 / 3))
    assert torch.isclose(losses.distillation_loss(10 * teacher + 10, 10 * teacher), torch.tensor(1 / 3))


def test_sparsity_penalises_only_under_pruning():
    realised = [torch.tensor(0.1), torch.tensor(0.7)]
    assert torch.isclose(losses.sparsity_loss([0.3, 0.5], realised), torch.tensor(0.2))


def test_soft_sparsity_leaves_out_reserved_and_padding():
    p = torch.tensor([[1.0, 0.2, 0.6, 1.0, 0.9]])
    real = torch.tensor([[True, True, True, True, False]])
    reserved = torch.tensor([[True, False, False, True, False]])
    assert torch.isclose(losses.soft_sparsity(p, real, reserved), torch.tensor(0.6))
    assert losses.soft_sparsity(p, real, real) == 0


def test_guide_is_cross_entropy_over_real_tokens():
    p, real = torch.tensor([[0.8, 0.3, 0.5]]), torch.tensor([[True, True, False]])
    expected = -(math.log(0.8) + math.log(0.7)) / 2
    assert torch.isclose(losses.guide_loss(p, torch.tensor([[1, 0, 1]]), real), torch.tensor(expected))
    assert torch.isfinite(losses.guide_loss(torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([[1, 0, 1]]), real))


def test_guide_decays_linearly_over_its_share():
    assert [losses.guide_weight(2.0, t, 100, 0.5) for t in (0, 25, 50, 99)] == [2.0, 1.0, 0.0, 0.0]
    assert losses.guide_weight(2.0, 0, 100, 0.0) == 0.0
