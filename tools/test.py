"""Tests a config of mmdet, mmseg or mmpretrain: their own test.py, by its scope.

    python tools/test.py CONFIG CHECKPOINT [--work-dir DIR] [--cfg-options KEY=VALUE ...]

``CONFIG CHECKPOINT --help`` shows all arguments of the toolbox in question.
"""
import sys

if __name__ == '__main__':
    if sys.argv[1:] in (['-h'], ['--help']):
        print(__doc__.strip())
        sys.exit()
    # Only now: it takes seconds, which --help need not wait for.
    from mmlavit.launch import main
    main('test')
