"""Writes the metafiles, by which mim and the toolboxes find configs and weights.

    python tools/make_metafiles.py            # writes those that are stale
    python tools/make_metafiles.py --check    # names them; exit code 1 if there are any

They are model-index.yml and a metafile.yml in every folder of configs. Figures,
weights and names are those of configs/published.yml, the length of the training and
the batch size those of the config. Published figures are marked so; what was trained
here has the plain names.
"""
import argparse
import sys
import warnings
from pathlib import Path
from typing import Dict, Optional

import yaml
from mmengine.config import Config

ROOT = Path(__file__).resolve().parents[1]
HEADER = ('# Written by tools/make_metafiles.py from configs/published.yml: '
          'change that.\n')


def read_schedule(config: Path) -> dict:
    """Length of the training and batch size, by the metafiles' names."""
    import mmlavit  # noqa: F401  (finds mmseg's bases with the OneDL forks)
    config = Config.fromfile(config, import_custom_modules=False)
    if 'max_iters' in config.train_cfg:
        length = {'Iterations': config.train_cfg.max_iters}
    else:
        length = {'Epochs': config.train_cfg.max_epochs}
    return {**length, 'Batch Size': config.auto_scale_lr.base_batch_size}


def make_metrics(row: dict, names: Dict[str, str]) -> dict:
    """What was trained here, and the published figures.

    Args:
        row: a row of a table.
        names: a column's name in the metafile.

    Raises:
        ValueError: If ``trained`` has a key that would stand nowhere.
    """
    trained = row.get('trained', {})
    unknown = trained.keys() - names.keys() - {'weights'}
    if unknown:
        raise ValueError(
            f"published.yml, {row['model']}: trained has {sorted(unknown)}; "
            f"expected weights and some of {sorted(names)}")
    return {
        **{name: trained[key] for key, name in names.items() if key in trained},
        **{f'{name} (published)': row[key]
           for key, name in names.items() if key in row}
    }


def make_model(row: dict, results: dict, collection: Optional[str]) -> dict:
    """A row as an entry of a metafile."""
    config = Path('configs', row['config'])
    metadata = {'Training Data': results['dataset'],
                **read_schedule(ROOT / config)}
    for key, name, unit in (('macs', 'FLOPs', 1e9), ('params', 'Parameters', 1e6)):
        if key in row:
            metadata[f'{name} (published)'] = round(row[key] * unit)
    # A zoo's weights beside figures of our own training would mislead.
    weights = row.get('trained', row).get('weights')
    metrics = make_metrics(row, results['metrics'])
    entry = {
        'Name': config.stem,
        'In Collection': collection,
        'Config': config.as_posix(),
        'Weights': weights,
        'Metadata': metadata,
        'Results': metrics and [{
            'Task': results['task'],
            'Dataset': results['dataset'],
            'Metrics': metrics
        }]
    }
    return {key: value for key, value in entry.items() if value}


def make_files(published: dict) -> Dict[str, dict]:
    """The content of every file, by its path from the root."""
    files = {}
    for name, results in published['results'].items():
        for row in published[name]:
            if 'config' not in row:
                continue
            folder = Path('configs', row['config']).parent.as_posix()
            collection = published['collections'].get(folder)
            content = files.setdefault(
                f'{folder}/metafile.yml',
                dict(Collections=[collection], Models=[]) if collection else
                dict(Models=[]))
            content['Models'].append(
                make_model(row, results, collection and collection['Name']))
    return {**files, 'model-index.yml': {'Import': list(files)}}


def as_text(content: dict) -> str:
    parts = (yaml.safe_dump({key: value}, sort_keys=False, width=float('inf'))
             for key, value in content.items())
    return HEADER + '\n'.join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--check', action='store_true',
        help='write nothing, only name what is stale; default: write; e.g. --check')
    check = parser.parse_args().check
    # mmengine's, once for every base of every config.
    warnings.filterwarnings('ignore', 'pkg_resources is deprecated')
    published = yaml.safe_load((ROOT / 'configs/published.yml').read_text())
    stale = {
        name: text for name, text in
        ((name, as_text(content)) for name, content in make_files(published).items())
        if not (ROOT / name).is_file() or (ROOT / name).read_text() != text
    }
    if check and stale:
        sys.exit(f"stale: {', '.join(stale)}; run python tools/make_metafiles.py")
    for name, text in stale.items():
        (ROOT / name).write_text(text)
        print(f'written: {name}')


if __name__ == '__main__':
    main()
