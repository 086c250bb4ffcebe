//! tc programs on kernels before 6.6, which have no TCX: a clsact qdisc on the device, and a filter
//! with a fixed priority and handle per direction, so that a restart replaces the filter instead of
//! adding one.
//!
//! Filters cannot be pinned. A folder under `clsact/` notes each device with shunt's filters,
//! `<device>-<index>-made` when shunt made the qdisc too and `-found` when it was there: `cleanup`
//! removes only the former.

use std::{fs, io, path::Path};

use aya::programs::{
    Link, ProgramError, SchedClassifier, TcAttachType, TcError,
    tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
};
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{TcHandle as Handle, TcMessage},
};

use super::{Paths, bpf::link::Hook, escape, rtnl, unescape};

/// Before all others: a filter that ends the search ("ok") must not hide Service traffic.
const PRIORITY: u16 = 1;
/// Of the filters of that priority, shunt's ("SH").
const HANDLE: TcHandle = TcHandle::new(0, 0x5348);

const DIRECTIONS: [(Hook, TcAttachType, u16); 2] = [
    (Hook::TcxIngress, TcAttachType::Ingress, Handle::MIN_INGRESS),
    (Hook::TcxEgress, TcAttachType::Egress, Handle::MIN_EGRESS),
];

/// A device with shunt's filters, as noted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Note {
    /// The device's name when the filters were attached.
    pub(crate) device: String,
    /// Its index.
    pub(crate) index: u32,
    /// Whether shunt made the qdisc.
    pub(crate) made: bool,
}

impl Note {
    fn file_name(&self) -> String {
        format!(
            "{}-{}-{}",
            escape(&self.device),
            self.index,
            if self.made { "made" } else { "found" }
        )
    }

    fn parse(name: &str) -> Option<Self> {
        let (rest, how) = name.rsplit_once('-')?;
        let (device, index) = rest.rsplit_once('-')?;
        let made = match how {
            "made" => true,
            "found" => false,
            _ => return None,
        };
        Some(Self {
            device: unescape(device),
            index: index.parse().ok()?,
            made,
        })
    }

    /// Forgets the device.
    pub(crate) fn remove(&self, paths: &Paths) -> io::Result<()> {
        match fs::remove_dir(paths.clsact().join(self.file_name())) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}

/// All notes.
pub(crate) fn notes(paths: &Paths) -> io::Result<Vec<Note>> {
    match fs::read_dir(paths.clsact()) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e),
        Ok(entries) => entries
            .map(|e| Ok(Note::parse(&e?.file_name().to_string_lossy())))
            .filter_map(Result::transpose)
            .collect(),
    }
}

/// Makes sure that the device has a clsact qdisc, and notes whose it is.
pub(crate) fn ensure_qdisc(paths: &Paths, device: &str, index: u32) -> io::Result<()> {
    let made = match aya::programs::tc::qdisc_add_clsact(device) {
        Ok(()) => true,
        Err(e) => match tc_errno(&e) {
            Some(libc::EEXIST) => false,
            _ => return Err(tc_io(e)),
        },
    };
    let old: Vec<Note> = notes(paths)?
        .into_iter()
        .filter(|n| n.index == index)
        .collect();
    // One that was there and is noted as made was made by an agent before this one.
    let made = made || old.iter().any(|n| n.made);
    let note = Note {
        device: device.to_owned(),
        index,
        made,
    };
    fs::create_dir_all(paths.clsact().join(note.file_name()))?;
    for old in old.iter().filter(|&n| *n != note) {
        old.remove(paths)?;
    }
    Ok(())
}

/// Puts the program pinned at `program` in this direction of the device, in the place of shunt's
/// filter if there is one.
pub(crate) fn attach(device: &str, hook: Hook, program: &Path) -> io::Result<()> {
    let direction = direction(hook)?;
    let mut program = SchedClassifier::from_pin(program).map_err(program_io)?;
    let old = SchedClassifierLink::attached(device, direction, PRIORITY, HANDLE, None)?;
    let id = match program.attach_to_link(old) {
        Err(e) if program_errno(&e) == Some(libc::ENOENT) => {
            let options = NlOptions {
                priority: PRIORITY,
                handle: HANDLE,
                classid: None,
            };
            program.attach_with_options(device, direction, TcAttachOptions::Netlink(options))
        }
        result => result,
    };
    // The filter stays when this process ends.
    std::mem::forget(
        program
            .take_link(id.map_err(program_io)?)
            .map_err(program_io)?,
    );
    Ok(())
}

/// Removes shunt's filters from the noted device, and the qdisc if shunt made it and nobody else
/// has filters there.
pub(crate) fn detach(note: &Note) -> io::Result<()> {
    let gone = |e: &io::Error| {
        matches!(
            e.raw_os_error(),
            Some(libc::ENOENT | libc::ENODEV | libc::EINVAL)
        )
    };
    // The name may be another device's by now.
    if rtnl::device_index(&note.device)? != Some(note.index) {
        return Ok(());
    }
    for (_, direction, _) in DIRECTIONS {
        let link = SchedClassifierLink::attached(&note.device, direction, PRIORITY, HANDLE, None)?;
        match link.detach().map_err(program_io) {
            Err(e) if !gone(&e) => return Err(e),
            _ => {}
        }
    }
    if note.made && !has_filters(note.index)? {
        let mut qdisc = TcMessage::with_index(note.index as i32);
        qdisc.header.handle = Handle {
            major: 0xffff,
            minor: 0,
        };
        qdisc.header.parent = Handle {
            major: 0xffff,
            minor: 0xfff1,
        };
        match rtnl::change(RouteNetlinkMessage::DelQueueDiscipline(qdisc)) {
            Err(e) if !gone(&e) => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

fn has_filters(index: u32) -> io::Result<bool> {
    for (_, _, minor) in DIRECTIONS {
        let mut message = TcMessage::with_index(index as i32);
        message.header.parent = Handle {
            major: 0xffff,
            minor,
        };
        if !rtnl::dump(RouteNetlinkMessage::GetTrafficFilter(message))?.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

fn direction(hook: Hook) -> io::Result<TcAttachType> {
    DIRECTIONS
        .iter()
        .find(|(h, ..)| *h == hook)
        .map(|&(_, direction, _)| direction)
        .ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{hook:?} is no direction of tc"),
            )
        })
}

fn tc_errno(error: &TcError) -> Option<i32> {
    match error {
        TcError::NetlinkError(e) => e.raw_os_error(),
        TcError::IoError(e) => e.raw_os_error(),
        TcError::AlreadyAttached => Some(libc::EEXIST),
        _ => None,
    }
}

fn tc_io(error: TcError) -> io::Error {
    tc_errno(&error).map_or_else(|| io::Error::other(error), io::Error::from_raw_os_error)
}

fn program_errno(error: &ProgramError) -> Option<i32> {
    match error {
        ProgramError::TcError(e) => tc_errno(e),
        ProgramError::NetlinkError(e) => e.raw_os_error(),
        ProgramError::SyscallError(e) => e.io_error.raw_os_error(),
        ProgramError::IOError(e) => e.raw_os_error(),
        _ => None,
    }
}

fn program_io(error: ProgramError) -> io::Error {
    program_errno(&error).map_or_else(|| io::Error::other(error), io::Error::from_raw_os_error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_read_as_written() {
        for (device, made) in [("eth0.100", true), ("a-b-c", false)] {
            let note = Note {
                device: device.to_owned(),
                index: 12,
                made,
            };
            assert_eq!(Note::parse(&note.file_name()), Some(note));
        }
        assert_eq!(Note::parse("eth0-x-made"), None);
        assert_eq!(Note::parse("eth0-1-lost"), None);
    }
}
