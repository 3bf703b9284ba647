"""The papers that a card cites: those of the losses and networks that the recipe names, and no others."""

from __future__ import annotations

from collections.abc import Iterable

from deit_kd.recipe import Distill
from deit_kd.recipe.objectives import FEATURE_OBJECTIVES, LOGIT_OBJECTIVES

PAPERS = {  # key -> kind, and what BibTeX says of it
    "miles2024understanding": (
        "inproceedings",
        "Understanding the Role of the Projector in Knowledge Distillation",
        "Miles, Roy and Mikolajczyk, Krystian",
        "AAAI",
        2024,
    ),
    "miles2024vkd": (
        "inproceedings",
        "{$V_kD$}: Improving Knowledge Distillation using Orthogonal Projections",
        "Miles, Roy and Elezi, Ismail and Deng, Jiankang",
        "CVPR",
        2024,
    ),
    "wang2023improving": (
        "article",
        "Improving Knowledge Distillation via Regularizing Feature Norm and Direction",
        "Wang, Yuzhu and Cheng, Lechao and Duan, Manni and Wang, Yongheng and Feng, Zunlei and Kong, Shu",
        "arXiv:2305.17007",
        2023,
    ),
    "romero2015fitnets": (
        "inproceedings",
        "{FitNets}: Hints for Thin Deep Nets",
        "Romero, Adriana and Ballas, Nicolas and Kahou, Samira Ebrahimi and Chassang, Antoine and Gatta, Carlo and Bengio, Yoshua",
        "ICLR",
        2015,
    ),
    "zagoruyko2017paying": (
        "inproceedings",
        "Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via Attention Transfer",
        "Zagoruyko, Sergey and Komodakis, Nikos",
        "ICLR",
        2017,
    ),
    "peng2019correlation": (
        "inproceedings",
        "Correlation Congruence for Knowledge Distillation",
        "Peng, Baoyun and Jin, Xiao and Liu, Jiaheng and Li, Dongsheng and Wu, Yichao and Liu, Yu and Zhou, Shunfeng and Zhang, Zhaoning",
        "ICCV",
        2019,
    ),
    "tian2020contrastive": (
        "inproceedings",
        "Contrastive Representation Distillation",
        "Tian, Yonglong and Krishnan, Dilip and Isola, Phillip",
        "ICLR",
        2020,
    ),
    "chen2021distilling": (
        "inproceedings",
        "Distilling Knowledge via Knowledge Review",
        "Chen, Pengguang and Liu, Shu and Zhao, Hengshuang and Jia, Jiaya",
        "CVPR",
        2021,
    ),
    "zhao2023cumulative": (
        "inproceedings",
        "Cumulative Spatial Knowledge Distillation for Vision Transformers",
        "Zhao, Borui and Song, Renjie and Liang, Jiajun",
        "ICCV",
        2023,
    ),
    "hinton2015distilling": (
        "article",
        "Distilling the Knowledge in a Neural Network",
        "Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff",
        "arXiv:1503.02531",
        2015,
    ),
    "touvron2021training": (
        "inproceedings",
        "Training Data-Efficient Image Transformers \\& Distillation through Attention",
        "Touvron, Hugo and Cord, Matthieu and Douze, Matthijs and Massa, Francisco and Sablayrolles, Alexandre and J{\\'e}gou, Herv{\\'e}",
        "ICML",
        2021,
    ),
    "zhao2022decoupled": (
        "inproceedings",
        "Decoupled Knowledge Distillation",
        "Zhao, Borui and Cui, Quan and Song, Renjie and Qiu, Yiyu and Liang, Jiajun",
        "CVPR",
        2022,
    ),
    "huang2022knowledge": (
        "inproceedings",
        "Knowledge Distillation from A Stronger Teacher",
        "Huang, Tao and You, Shan and Wang, Fei and Qian, Chen and Xu, Chang",
        "NeurIPS",
        2022,
    ),
    "yang2023knowledge": (
        "inproceedings",
        "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels",
        "Yang, Zhendong and Zeng, Ailing and Li, Zhe and Zhang, Tianke and Yuan, Chun and Li, Yu",
        "ICCV",
        2023,
    ),
    "beyer2022knowledge": (
        "inproceedings",
        "Knowledge Distillation: A Good Teacher is Patient and Consistent",
        "Beyer, Lucas and Zhai, Xiaohua and Royer, Am{\\'e}lie and Markeeva, Larisa and Anil, Rohan and Kolesnikov, Alexander",
        "CVPR",
        2022,
    ),
}


def cited(distills: Iterable[Distill], label_weight: float, student: str) -> list[str]:
    """Keys of `PAPERS`, or entries of registered losses: of each loss that has a weight, of training without labels, of DeiT where the student's name says it is one."""
    keys = []
    for distill in distills:
        if distill.feature_loss is not None and distill.feature_weight:
            keys.append(FEATURE_OBJECTIVES[distill.feature_loss].paper)
        if distill.kd_loss is not None and distill.kd_weight:
            keys.append(LOGIT_OBJECTIVES[distill.kd_loss].paper)
        keys += ["beyer2022knowledge"] if distill.kd_weight and not label_weight else []
    keys += ["touvron2021training"] if student.startswith("deit") else []
    return list(filter(None, dict.fromkeys(keys)))  # a registered loss may name none


def bibtex(key: str) -> str:
    """The entry of a paper; a registered loss states its own."""
    if key not in PAPERS:
        return key.strip()
    kind, title, authors, place, year = PAPERS[key]
    venue = "journal" if kind == "article" else "booktitle"
    fields = {"title": title, "author": authors, venue: place, "year": year}
    width = max(map(len, fields))
    return (
        "\n".join([f"@{kind}{{{key},", *(f"  {name:<{width}} = {{{value}}}," for name, value in fields.items())]).rstrip(",")
        + "\n}"
    )
