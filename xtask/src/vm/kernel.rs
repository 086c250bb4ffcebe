//! Kernels to boot: Debian's packages, taken apart.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::shell::{capture, run, say};

/// Suites that carry kernels, oldest first: 6.1, 6.12 twice, and newer ones.
const SUITES: [&str; 5] = [
    "bookworm",
    "bookworm-backports",
    "trixie",
    "trixie-backports",
    "sid",
];
const MIRROR: &str = "http://deb.debian.org/debian";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A kernel with its modules.
pub(super) struct Kernel {
    /// What `uname -r` prints in it.
    pub(super) release: String,
    /// The bzImage.
    pub(super) image: PathBuf,
    /// The folder of `lib/modules/<release>`.
    pub(super) root: PathBuf,
}

/// A folder's kernel, or Debian's newest of a series, fetched once.
///
/// # Errors
///
/// When the folder holds none, Debian has none of the series, or it cannot be fetched.
pub(super) fn find(folder: &Path, wanted: &str) -> Result<Kernel> {
    let given = Path::new(wanted);
    if given.join("boot").is_dir() {
        return inspect(given);
    }
    if wanted.is_empty() || !wanted.split('.').all(|part| part.parse::<u32>().is_ok()) {
        bail!(
            "--kernel {wanted}: neither a series such as 6.12 nor a folder with boot/vmlinuz-* and lib/modules"
        );
    }
    let root = folder.join(wanted);
    if !root.join("boot").is_dir() {
        fetch(folder, wanted, &root)?;
    }
    inspect(&root)
}

fn inspect(root: &Path) -> Result<Kernel> {
    let boot = root.join("boot");
    let images = fs::read_dir(&boot).with_context(|| format!("{}", boot.display()))?;
    let (release, image) = images
        .flatten()
        .find_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            Some((name.strip_prefix("vmlinuz-")?.to_owned(), entry.path()))
        })
        .with_context(|| format!("{}: no vmlinuz-*", boot.display()))?;
    // Debian has moved modules below /usr.
    let root = [root.to_path_buf(), root.join("usr")]
        .into_iter()
        .find(|root| root.join("lib/modules").join(&release).is_dir())
        .with_context(|| format!("{}: no lib/modules/{release}", root.display()))?;
    if !root
        .join("lib/modules")
        .join(&release)
        .join("modules.dep")
        .is_file()
    {
        run(Command::new("depmod").arg("-b").arg(&root).arg(&release))?;
    }
    Ok(Kernel {
        release,
        image,
        root,
    })
}

/// Takes the newest package of a series apart into `root`, with package lists of its own: this
/// machine's are left alone.
fn fetch(folder: &Path, series: &str, root: &Path) -> Result<()> {
    let apt = folder.join("apt");
    let lists = apt.join("lists/partial");
    fs::create_dir_all(&lists).with_context(|| format!("{}", lists.display()))?;
    if !Path::new(KEYRING).is_file() {
        bail!("{KEYRING} is missing: install debian-archive-keyring");
    }
    let sources = apt.join("sources.list");
    let text: String = SUITES
        .iter()
        .map(|suite| format!("deb [arch=amd64 signed-by={KEYRING}] {MIRROR} {suite} main\n"))
        .collect();
    fs::write(&sources, text).with_context(|| format!("{}", sources.display()))?;
    let options = [
        "Dir::Etc::sourceparts=-".to_owned(),
        format!("Dir::Etc::sourcelist={}", sources.display()),
        format!("Dir::State::lists={}", apt.join("lists").display()),
        // Otherwise apt-get gives its privileges up, and cannot write here.
        "APT::Sandbox::User=root".to_owned(),
    ];
    let tool = |program: &str| {
        let mut command = Command::new(program);
        command.current_dir(&apt);
        for option in &options {
            command.args(["-o", option]);
        }
        command
    };
    say(
        "kernel",
        format_args!("looking for Linux {series} in Debian"),
    );
    capture(tool("apt-get").args(["update", "-qq"]))?;
    let pattern = format!(
        "^linux-image-{}\\..*-amd64-unsigned$",
        series.replace('.', "\\.")
    );
    let found = capture(tool("apt-cache").args(["search", "--names-only", &pattern]))?;
    let newest = found
        .lines()
        .filter_map(|line| line.split(' ').next())
        .filter(|package| !package.contains("cloud") && !package.contains("-rt-"))
        .max_by_key(|package| numbers(package))
        .with_context(|| format!("Debian ({}) has no kernel {series}", SUITES.join(", ")))?;
    say("kernel", format_args!("fetching {newest}"));
    capture(tool("apt-get").args(["download", newest]))?;
    let archive = fs::read_dir(&apt)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .with_context(|| format!("apt-get download {newest} left no package"))?;
    // Not under its name before it is whole.
    let part = folder.join(format!("{series}.part"));
    capture(
        Command::new("dpkg-deb")
            .arg("--extract")
            .arg(&archive)
            .arg(&part),
    )?;
    fs::remove_file(&archive)?;
    fs::rename(&part, root).with_context(|| format!("{}", root.display()))
}

/// The numbers of a package's name, by which its versions are ordered.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernel_is_the_one_with_the_highest_numbers() {
        let [old, new] = [
            "linux-image-6.12.9+deb13-amd64-unsigned",
            "linux-image-6.12.95+deb13-amd64-unsigned",
        ];
        assert!(numbers(old) < numbers(new));
        assert!(
            numbers("linux-image-6.1.0-9-amd64-unsigned")
                < numbers("linux-image-6.1.0-53-amd64-unsigned")
        );
    }
}
