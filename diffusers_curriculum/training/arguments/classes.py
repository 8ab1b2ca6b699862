"""Flags of classes, and of pictures of them or of any."""

from __future__ import annotations

from diffusers_curriculum.training.arguments.flag import NOT_NEGATIVE, SHARE, Need, count, tracked

GUIDED = Need(
    "pictures (drop --no_pictures) or --eval_steps",
    lambda a: not a.no_pictures or a.eval_steps is not None,
)
LABEL_COLUMN = tracked("label_column", str, "label", "column with the classes", setting="dataset")
LABEL_DROPOUT = tracked(
    "label_dropout",
    float,
    0.1,
    "share of samples trained without their class, for classifier-free guidance",
    bound=SHARE,
    setting="images",
)
OF_CLASSES = (
    tracked(
        "validation_classes",
        str,
        help="numbers or names of the classes that are drawn (default: the first ten)",
        nargs="+",
        metavar="CLASS",
    ),
    count("validation_images_per_class", 8, "pictures of each", most=10_000),
)
OF_ANY_CLASS = count("eval_batch_size", 16, "pictures drawn", most=10_000)
GUIDANCE = tracked(
    "guidance_scale",
    float,
    1.5,
    "classifier-free guidance of pictures and of metrics",
    bound=NOT_NEGATIVE,
    needs=(GUIDED,),
)
PICTURE_EPOCHS = count("validation_epochs", 10, "epochs between pictures")
