//! Files and folders of manifests: found, read and watched.

use std::{
    collections::HashSet,
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use notify::{
    EventKind, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode},
};
use tokio::sync::mpsc;

/// Folders are looked through so often when the kernel tells of changes: it does not for network
/// file systems, and not for the targets of symbolic links.
pub(crate) const POLL: Duration = Duration::from_secs(5);
/// The same where the kernel cannot tell.
pub(crate) const POLL_ALONE: Duration = Duration::from_millis(500);
/// Deepest folder below a given one; symbolic links could go on for ever.
const MOST_DEPTH: usize = 16;

/// A watcher that sends a word for every change; `None` where the kernel has none to give.
pub(crate) fn watch(
    paths: &[PathBuf],
    wake: &mpsc::Sender<()>,
) -> Option<notify::RecommendedWatcher> {
    let wake = wake.clone();
    // Events name absolute paths.
    let paths: Vec<PathBuf> = paths
        .iter()
        .map(|path| std::path::absolute(path).unwrap_or_else(|_| path.clone()))
        .collect();
    let ours = paths.clone();
    let on_event = move |event: notify::Result<notify::Event>| {
        let matters = match event {
            // Reading is an event too: answering it by reading would never end.
            Ok(event) => match event.kind {
                EventKind::Access(AccessKind::Close(AccessMode::Write)) => {
                    concerns(&ours, &event.paths)
                }
                EventKind::Access(_) => false,
                _ => concerns(&ours, &event.paths),
            },
            Err(_) => true,
        };
        if matters {
            // Full: a word is already waiting.
            let _ = wake.try_send(());
        }
    };
    let start = || -> notify::Result<notify::RecommendedWatcher> {
        let mut watcher = notify::recommended_watcher(on_event)?;
        for path in &paths {
            if path.is_dir() {
                watcher.watch(path, RecursiveMode::Recursive)?;
            } else {
                // Editors replace files: the folder outlives them.
                let folder = path
                    .parent()
                    .filter(|folder| !folder.as_os_str().is_empty());
                watcher.watch(
                    folder.unwrap_or(Path::new(".")),
                    RecursiveMode::NonRecursive,
                )?;
            }
        }
        Ok(watcher)
    };
    match start() {
        Ok(watcher) => Some(watcher),
        Err(error) => {
            tracing::warn!(
                "the kernel does not tell of changes to manifests ({error}); looking every {POLL_ALONE:?} instead"
            );
            None
        }
    }
}

/// Whether a change at `changed` is one of our files; other files of a watched file's folder are
/// not.
fn concerns(ours: &[PathBuf], changed: &[PathBuf]) -> bool {
    // A mounted ConfigMap changes by its hidden link `..data`.
    let swapped = |path: &PathBuf| {
        path.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with(".."))
    };
    let ends = |path: &PathBuf, our: &PathBuf| {
        path.starts_with(our) || path.file_name() == our.file_name()
    };
    changed.is_empty()
        || changed
            .iter()
            .any(|path| swapped(path) || ours.iter().any(|our| ends(path, our)))
}

/// What a look at the files found.
#[derive(Debug, Default)]
pub(super) struct Files {
    /// Every file with its text, in the order in which they count.
    pub(super) files: Vec<(PathBuf, io::Result<String>)>,
    /// Folders that could not be read; what is known from below them stays.
    pub(super) unreadable: Vec<(PathBuf, io::Error)>,
}

/// Reads all files below the paths.
pub(super) async fn read(paths: &[PathBuf]) -> Files {
    let paths = paths.to_vec();
    let read = tokio::task::spawn_blocking(move || {
        let mut found = Files::default();
        let (files, unreadable) = list(&paths);
        found.unreadable = unreadable;
        for file in files {
            match fs::read(&file) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => found.files.push((file, Err(error))),
                Ok(bytes) => {
                    let text = String::from_utf8(bytes).map_err(|_| {
                        io::Error::new(io::ErrorKind::InvalidData, "is not UTF-8 text")
                    });
                    found.files.push((file, text));
                }
            }
        }
        found
    });
    read.await.unwrap_or_default()
}

/// All files below the paths, each once, in order; and the folders that cannot be read.
pub(super) fn list(paths: &[PathBuf]) -> (Vec<PathBuf>, Vec<(PathBuf, io::Error)>) {
    let (mut files, mut unreadable, mut known) = (Vec::new(), Vec::new(), HashSet::new());
    for path in paths {
        let mut below = Vec::new();
        match fs::metadata(path) {
            Ok(meta) if meta.is_dir() => walk(path, 0, &mut below, &mut unreadable),
            Ok(_) => below.push(path.clone()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => unreadable.push((path.clone(), error)),
        }
        files.extend(below.into_iter().filter(|file| known.insert(file.clone())));
    }
    (files, unreadable)
}

fn walk(
    folder: &Path,
    depth: usize,
    files: &mut Vec<PathBuf>,
    unreadable: &mut Vec<(PathBuf, io::Error)>,
) {
    let entries = fs::read_dir(folder).and_then(|entries| entries.collect::<io::Result<Vec<_>>>());
    let entries = match entries {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => return unreadable.push((folder.to_owned(), error)),
    };
    let mut paths: Vec<PathBuf> = entries.iter().map(fs::DirEntry::path).collect();
    paths.sort();
    for path in paths {
        let hidden = path
            .file_name()
            .is_none_or(|name| name.to_string_lossy().starts_with('.'));
        if hidden {
            continue;
        }
        let wanted = path.extension().is_some_and(|extension| {
            ["yaml", "yml", "json"]
                .iter()
                .any(|known| extension.eq_ignore_ascii_case(known))
        });
        match fs::metadata(&path) {
            Ok(meta) if meta.is_dir() && depth < MOST_DEPTH => {
                walk(&path, depth + 1, files, unreadable)
            }
            Ok(meta) if meta.is_file() && wanted => files.push(path),
            _ => {}
        }
    }
}

/// What tells whether any file changed, without reading them.
pub(crate) fn signature(paths: &[PathBuf]) -> Vec<(PathBuf, u64, Option<SystemTime>, u64)> {
    use std::os::unix::fs::MetadataExt;
    let (files, _) = list(paths);
    files
        .into_iter()
        .filter_map(|file| {
            let meta = fs::metadata(&file).ok()?;
            Some((file, meta.len(), meta.modified().ok(), meta.ino()))
        })
        .collect()
}
