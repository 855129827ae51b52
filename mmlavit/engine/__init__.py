"""What mmlavit adds to mmengine and changes in it."""


def install() -> None:
    """Every effect on the whole process that importing mmlavit has.

    - `environment`: checks torch, mmengine and mmcv; ``mmseg::`` bases load where
      OneDL's fork of mmsegmentation is.
    - `safe_loading`: checkpoints are loaded as data.
    - `whole_files`: local files are there whole or not at all.
    - `checkpoint_hook`: ``CheckpointHook`` keeps two, reads back, compares; a resumed
      training goes on with its random numbers.
    - `dp_loss`: models add the DP loss of their backbone to their losses.
    - `feature_maps`: models refuse a neck or head that does not fit the backbone's
      maps, and say which map nobody reads.
    - `flops`: handles that mmengine's counter lacks.

    Registered under names of their own, without further effect: ``InvalidLossHook``
    and ``MergedGroupsConstructor``.
    """
    from . import environment
    environment.install()  # first: says what is missing
    from . import (checkpoint_hook, dp_loss, feature_maps,  # noqa: F401
                   flops, invalid_loss, optim, safe_loading, whole_files)
    for part in (safe_loading, whole_files, checkpoint_hook, dp_loss, feature_maps,
                 flops):
        part.install()
