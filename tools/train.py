"""Trains a config of mmdet, mmseg or mmpretrain: their own train.py, by its scope.

    python tools/train.py CONFIG [--work-dir DIR] [--cfg-options KEY=VALUE ...]

``CONFIG --help`` shows all arguments of the toolbox in question.
"""
from mmlavit.launch import main

if __name__ == '__main__':
    main('train')
