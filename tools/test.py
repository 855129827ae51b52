"""Tests a config of mmdet, mmseg or mmpretrain: their own test.py, by its scope.

    python tools/test.py CONFIG CHECKPOINT [--work-dir DIR] [--cfg-options KEY=VALUE ...]

``CONFIG CHECKPOINT --help`` shows all arguments of the toolbox in question.
"""
from mmlavit.launch import main

if __name__ == '__main__':
    main('test')
