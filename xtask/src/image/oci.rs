//! Layers, manifests and the archive: <https://github.com/opencontainers/image-spec>.

use std::{collections::BTreeMap, io::Write};

use anyhow::{Context, Result};
use flate2::{Compression, GzBuilder};
use oci_spec::image::{
    Arch as OciArch, ConfigBuilder, Descriptor, DescriptorBuilder, ImageConfigurationBuilder,
    ImageIndexBuilder, ImageManifestBuilder, MediaType, OciLayoutBuilder, Os, PlatformBuilder,
    RootFsBuilder, SCHEMA_VERSION, Sha256Digest,
};
use sha2::{Digest, Sha256};
use tar::{EntryType, Header};

use super::arch::Arch;

/// The image's name; `deploy/base/daemonset.yaml` has the same.
pub(super) const NAME: &str = concat!("localhost/shunt:", env!("CARGO_PKG_VERSION"));

/// Where the agent is in the image.
pub(super) const AGENT: &str = "usr/bin/shunt";
/// Where rustls and everybody else look for CA roots.
const ROOTS: &str = "etc/ssl/certs/ca-certificates.crt";

/// A layer as it is and as it is stored.
pub(super) struct Layer {
    /// Digest of the tar.
    diff_id: String,
    /// The compressed tar.
    bytes: Vec<u8>,
}

/// Mozilla's CA roots as a PEM file: for API servers whose kubeconfig names no CA of its own.
pub(super) fn ca_roots() -> String {
    let certificates: Vec<pem::Pem> = webpki_root_certs::TLS_SERVER_ROOT_CERTS
        .iter()
        .map(|certificate| pem::Pem::new("CERTIFICATE", certificate.to_vec()))
        .collect();
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_many_config(&certificates, config)
}

/// The image's only layer.
///
/// # Errors
///
/// None but for lack of memory.
pub(super) fn layer(agent: &[u8], roots: &str) -> Result<Layer> {
    let mut tar = tar::Builder::new(Vec::new());
    let files = [(AGENT, 0o755, agent), (ROOTS, 0o644, roots.as_bytes())];
    let mut folders: Vec<&str> = Vec::new();
    for (path, mode, bytes) in files {
        for (end, _) in path.match_indices('/') {
            let folder = &path[..=end];
            if !folders.contains(&folder) {
                folders.push(folder);
                add(&mut tar, folder, EntryType::Directory, 0o755, &[])?;
            }
        }
        add(&mut tar, path, EntryType::Regular, mode, bytes)?;
    }
    let tar = tar.into_inner().context("layer")?;
    let mut gzip = GzBuilder::new()
        .mtime(0)
        .write(Vec::new(), Compression::default());
    gzip.write_all(&tar).context("layer")?;
    Ok(Layer {
        diff_id: format!("sha256:{}", sha256(&tar)),
        bytes: gzip.finish().context("layer")?,
    })
}

/// The archive: an image layout with an index by platform, under one name.
///
/// # Errors
///
/// None but for lack of memory.
pub(super) fn archive(name: &str, images: &[(Arch, Layer)]) -> Result<Vec<u8>> {
    let mut blobs = Blobs::default();
    let mut manifests = Vec::new();
    for (arch, layer) in images {
        let config = ImageConfigurationBuilder::default()
            .architecture(platform_arch(*arch))
            .os(Os::Linux)
            .config(
                ConfigBuilder::default()
                    .user("0:0")
                    .env(["PATH=/usr/bin".to_owned()])
                    .entrypoint([format!("/{AGENT}")])
                    .cmd(["--help".to_owned()])
                    .build()?,
            )
            .rootfs(
                RootFsBuilder::default()
                    .typ("layers")
                    .diff_ids([layer.diff_id.clone()])
                    .build()?,
            )
            .history([])
            .build()?;
        let config = blobs.add(MediaType::ImageConfig, serde_json::to_vec(&config)?)?;
        let layer = blobs.add(MediaType::ImageLayerGzip, layer.bytes.clone())?;
        let manifest = ImageManifestBuilder::default()
            .schema_version(SCHEMA_VERSION)
            .media_type(MediaType::ImageManifest)
            .config(config)
            .layers([layer])
            .build()?;
        let mut descriptor = blobs.add(MediaType::ImageManifest, serde_json::to_vec(&manifest)?)?;
        let platform = PlatformBuilder::default()
            .architecture(platform_arch(*arch))
            .os(Os::Linux)
            .build()?;
        descriptor.set_platform(Some(platform));
        manifests.push(descriptor);
    }
    let index = |manifests: Vec<Descriptor>| {
        ImageIndexBuilder::default()
            .schema_version(SCHEMA_VERSION)
            .media_type(MediaType::ImageIndex)
            .manifests(manifests)
            .build()
    };
    let image = blobs.add(
        MediaType::ImageIndex,
        serde_json::to_vec(&index(manifests)?)?,
    )?;
    // The first is containerd's, the second the specification's. As JSON, for the descriptor's own
    // map has no order.
    let mut root = serde_json::to_value(index(vec![image])?)?;
    root["manifests"][0]["annotations"] = serde_json::to_value(BTreeMap::from([
        ("io.containerd.image.name", name),
        ("org.opencontainers.image.ref.name", name),
    ]))?;

    let layout = OciLayoutBuilder::default()
        .image_layout_version("1.0.0")
        .build()?;
    let mut tar = tar::Builder::new(Vec::new());
    add(
        &mut tar,
        "oci-layout",
        EntryType::Regular,
        0o644,
        &serde_json::to_vec(&layout)?,
    )?;
    add(
        &mut tar,
        "index.json",
        EntryType::Regular,
        0o644,
        &serde_json::to_vec(&root)?,
    )?;
    for folder in ["blobs/", "blobs/sha256/"] {
        add(&mut tar, folder, EntryType::Directory, 0o755, &[])?;
    }
    for (digest, bytes) in &blobs.0 {
        add(
            &mut tar,
            &format!("blobs/sha256/{digest}"),
            EntryType::Regular,
            0o644,
            bytes,
        )?;
    }
    tar.into_inner().context("archive")
}

fn platform_arch(arch: Arch) -> OciArch {
    match arch {
        Arch::Amd64 => OciArch::Amd64,
        Arch::Arm64 => OciArch::ARM64,
    }
}

/// Blobs by digest.
#[derive(Default)]
struct Blobs(BTreeMap<String, Vec<u8>>);

impl Blobs {
    fn add(&mut self, media_type: MediaType, bytes: Vec<u8>) -> Result<Descriptor> {
        let digest = sha256(&bytes);
        let descriptor = DescriptorBuilder::default()
            .media_type(media_type)
            .digest(digest.parse::<Sha256Digest>()?)
            .size(bytes.len() as u64)
            .build()?;
        self.0.insert(digest, bytes);
        Ok(descriptor)
    }
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Adds a file or folder that belongs to root and has no time.
fn add(
    tar: &mut tar::Builder<Vec<u8>>,
    path: &str,
    kind: EntryType,
    mode: u32,
    bytes: &[u8],
) -> Result<()> {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(bytes.len() as u64);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    tar.append_data(&mut header, path, bytes)
        .with_context(|| path.to_owned())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use flate2::read::GzDecoder;
    use oci_spec::image::{ImageConfiguration, ImageIndex, ImageManifest};

    use super::*;

    fn unpack(tar: &[u8]) -> BTreeMap<String, (u32, Vec<u8>)> {
        let mut files = BTreeMap::new();
        for entry in tar::Archive::new(tar).entries().unwrap() {
            let mut entry = entry.unwrap();
            assert_eq!(entry.header().mtime().unwrap(), 0);
            let (path, mode) = (
                entry.path().unwrap().display().to_string(),
                entry.header().mode().unwrap(),
            );
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            files.insert(path, (mode, bytes));
        }
        files
    }

    #[test]
    fn an_archive_leads_from_its_name_to_the_agent() {
        let images = [
            (Arch::Amd64, layer(b"the agent", "roots").unwrap()),
            (Arch::Arm64, layer(b"the other agent", "roots").unwrap()),
        ];
        let bytes = archive("localhost/shunt:1", &images).unwrap();
        assert!(
            bytes == archive("localhost/shunt:1", &images).unwrap(),
            "the same bytes every time"
        );
        let files = unpack(&bytes);
        let blob = |descriptor: &Descriptor| {
            let (_, bytes) = &files[&format!("blobs/sha256/{}", descriptor.digest().digest())];
            assert_eq!(bytes.len() as u64, descriptor.size());
            assert_eq!(sha256(bytes), descriptor.digest().digest());
            bytes.clone()
        };
        assert_eq!(files["oci-layout"].1, br#"{"imageLayoutVersion":"1.0.0"}"#);
        let root: ImageIndex = serde_json::from_slice(&files["index.json"].1).unwrap();
        let [named] = &root.manifests()[..] else {
            panic!("{root:?}")
        };
        let annotations = named.annotations().as_ref().unwrap();
        assert_eq!(annotations["io.containerd.image.name"], "localhost/shunt:1");
        let index: ImageIndex = serde_json::from_slice(&blob(named)).unwrap();
        let agents = [
            (OciArch::Amd64, "the agent"),
            (OciArch::ARM64, "the other agent"),
        ];
        assert_eq!(index.manifests().len(), agents.len());
        for (descriptor, (arch, agent)) in index.manifests().iter().zip(agents) {
            assert_eq!(
                descriptor.platform().as_ref().unwrap().architecture(),
                &arch
            );
            let manifest: ImageManifest = serde_json::from_slice(&blob(descriptor)).unwrap();
            let config: ImageConfiguration =
                serde_json::from_slice(&blob(manifest.config())).unwrap();
            assert_eq!(config.architecture(), &arch);
            let run = config.config().as_ref().unwrap();
            assert_eq!(run.entrypoint().as_ref().unwrap()[..], ["/usr/bin/shunt"]);
            let mut tar = Vec::new();
            let compressed = blob(&manifest.layers()[0]);
            GzDecoder::new(&compressed[..])
                .read_to_end(&mut tar)
                .unwrap();
            assert_eq!(
                config.rootfs().diff_ids()[..],
                [format!("sha256:{}", sha256(&tar))]
            );
            let layer = unpack(&tar);
            assert_eq!(layer["usr/bin/shunt"], (0o755, agent.as_bytes().to_vec()));
            let paths: Vec<&str> = layer.keys().map(String::as_str).collect();
            assert_eq!(
                paths,
                [
                    "etc/",
                    "etc/ssl/",
                    "etc/ssl/certs/",
                    "etc/ssl/certs/ca-certificates.crt",
                    "usr/",
                    "usr/bin/",
                    "usr/bin/shunt"
                ],
                "nothing else"
            );
        }
    }

    #[test]
    fn the_roots_are_certificates() {
        let roots = ca_roots();
        let parsed = pem::parse_many(&roots).unwrap();
        assert!(parsed.len() > 50, "{}", parsed.len());
        assert!(
            parsed
                .iter()
                .all(|pem| pem.tag() == "CERTIFICATE" && pem.contents().starts_with(&[0x30]))
        );
        assert!(!roots.contains('\r'));
    }
}
