import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildWithMim(build_py):
    """Puts configs, weights, tools and the model index where ``mim`` looks for them.

    That is ``mmlavit/.mim`` inside the installed package: copies in a regular
    installation, links into the checkout in an editable one.
    """

    def run(self):
        super().run()
        if self.editable_mode:
            mim = ROOT / 'mmlavit' / '.mim'
        else:
            mim = Path(self.build_lib) / 'mmlavit' / '.mim'
        shutil.rmtree(mim, ignore_errors=True)
        mim.mkdir(parents=True)
        for name in ('configs', 'checkpoints', 'tools', 'model-index.yml'):
            source, target = ROOT / name, mim / name
            if self.editable_mode:
                target.symlink_to(Path('..', '..', name))
            elif source.is_dir():
                shutil.copytree(
                    source,
                    target,
                    ignore=shutil.ignore_patterns('__pycache__'))
            else:
                shutil.copy(source, target)


def requirements(name):
    lines = (ROOT / 'requirements' / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith('#')]


version = {}
exec((ROOT / 'mmlavit' / 'version.py').read_text(), version)

setup(
    name='mmlavit',
    version=version['__version__'],
    description='LaViT (Less-Attention Vision Transformer, CVPR 2024) for '
    'mmdetection, mmsegmentation and mmpretrain',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    keywords='computer vision, object detection, segmentation, backbone',
    python_requires='>=3.10',
    packages=find_packages(include=['mmlavit', 'mmlavit.*']),
    # No requirement on torch, mmengine, mmcv or a toolbox: pip cannot know
    # which build of them fits the machine, and their forks carry other names.
    # mmlavit checks what it finds when it is imported.
    install_requires=[],
    extras_require={
        'tools': requirements('tools.txt'),
        'export': requirements('export.txt'),
        'tests': requirements('tests.txt'),
    },
    cmdclass={'build_py': BuildWithMim},
    zip_safe=False,
)
