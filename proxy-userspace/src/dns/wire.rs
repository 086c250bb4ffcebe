//! Messages as they come and go ([RFC 1035](https://www.rfc-editor.org/rfc/rfc1035), EDNS0: [RFC
//! 6891](https://www.rfc-editor.org/rfc/rfc6891)): what is asked, and what fits into an answer.

use hickory_proto::{
    op::{
        Edns, Header, Message, MessageType, Metadata, OpCode, Query, ResponseCode,
        emit_message_parts,
    },
    rr::{DNSClass, Name, Record, RecordType},
    serialize::binary::{BinDecodable, BinDecoder, BinEncoder},
};

/// The port of DNS.
pub const PORT: u16 = 53;
/// Bytes of a UDP answer to a client that says nothing of more.
pub const PLAIN_UDP: u16 = 512;
/// Bytes of a UDP answer at most, and of what is asked for from others: what passes every path of
/// IPv6 without fragments (<https://www.dnsflagday.net/2020/>).
pub const MAX_UDP: u16 = 1232;
/// An OPT record without options: root, type, class, TTL, length.
const OPT_LEN: u16 = 11;
/// Bytes of a header, the least that can be answered.
const HEADER_LEN: usize = 12;

/// A question that can be answered.
#[derive(Clone, Debug)]
pub struct Question {
    /// The header's fields.
    pub metadata: Metadata,
    /// The name, letters as they were written.
    pub name: Name,
    /// The type.
    pub kind: RecordType,
    /// The client speaks EDNS0.
    pub edns: Option<ClientEdns>,
}

/// What a client's OPT record says.
#[derive(Clone, Copy, Debug)]
pub struct ClientEdns {
    /// Bytes of UDP that it takes.
    pub size: u16,
    /// It wants DNSSEC's records.
    pub dnssec_ok: bool,
}

/// What came in.
#[derive(Debug)]
pub enum Incoming {
    /// Something to answer.
    Question(Question),
    /// Something to refuse in these words, for this reason.
    Refused(Vec<u8>, ResponseCode),
    /// Something that nobody should answer: no header, or an answer itself.
    Nothing,
}

/// Reads a message.
pub fn read(bytes: &[u8]) -> Incoming {
    let Ok(header) = Header::read(&mut BinDecoder::new(
        bytes.get(..HEADER_LEN).unwrap_or_default(),
    )) else {
        return Incoming::Nothing;
    };
    // Two servers that answer each other's answers never end.
    if header.message_type == MessageType::Response {
        return Incoming::Nothing;
    }
    if header.op_code != OpCode::Query {
        return refuse(&header, None, ResponseCode::NotImp);
    }
    let Ok(message) = Message::from_vec(bytes) else {
        return refuse(&header, None, ResponseCode::FormErr);
    };
    let [query] = message.queries.as_slice() else {
        return refuse(&header, None, ResponseCode::FormErr);
    };
    let edns = message.edns.as_ref().map(|edns| ClientEdns {
        size: edns.max_payload().max(PLAIN_UDP),
        dnssec_ok: edns.flags().dnssec_ok,
    });
    let question = Question {
        metadata: message.metadata,
        name: query.name().clone(),
        kind: query.query_type(),
        edns,
    };
    if message.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
        return refuse(&header, Some(&question), ResponseCode::BADVERS);
    }
    let is_transfer = matches!(question.kind, RecordType::AXFR | RecordType::IXFR);
    if query.query_class() != DNSClass::IN || is_transfer {
        return refuse(&header, Some(&question), ResponseCode::Refused);
    }
    Incoming::Question(question)
}

fn refuse(header: &Header, question: Option<&Question>, code: ResponseCode) -> Incoming {
    let reply = Reply {
        code,
        ..Reply::default()
    };
    let bytes = match question {
        Some(question) => question.reply(&reply, PLAIN_UDP),
        None => {
            let mut metadata = Metadata::response_from_request(header);
            metadata.response_code = code;
            encode(&metadata, None, &reply, PLAIN_UDP)
        }
    };
    Incoming::Refused(bytes, code)
}

/// An answer before it is written.
#[derive(Clone, Debug)]
pub struct Reply {
    /// What came of it.
    pub code: ResponseCode,
    /// From the zone itself.
    pub authoritative: bool,
    /// Others are asked too.
    pub recursion_available: bool,
    /// The answer.
    pub answers: Vec<Record>,
    /// The SOA of a negative answer.
    pub authorities: Vec<Record>,
    /// What helps with the answer; left out where there is no room.
    pub additionals: Vec<Record>,
    /// Others have checked its signatures.
    pub authentic_data: bool,
}

impl Default for Reply {
    fn default() -> Self {
        Self {
            code: ResponseCode::NoError,
            authoritative: false,
            recursion_available: false,
            answers: Vec::new(),
            authorities: Vec::new(),
            additionals: Vec::new(),
            authentic_data: false,
        }
    }
}

impl Question {
    /// Bytes that an answer over UDP may have.
    pub fn udp_limit(&self) -> u16 {
        self.edns.map_or(PLAIN_UDP, |edns| edns.size.min(MAX_UDP))
    }

    /// An answer of at most so many bytes; what does not fit is left out, and the answer says so
    /// (TC).
    pub fn reply(&self, reply: &Reply, limit: u16) -> Vec<u8> {
        let mut metadata = Metadata::response_from_request(&self.metadata);
        metadata.response_code = reply.code;
        metadata.authoritative = reply.authoritative;
        metadata.recursion_available = reply.recursion_available;
        metadata.authentic_data = reply.authentic_data;
        let room = if self.edns.is_some() {
            limit - OPT_LEN
        } else {
            limit
        };
        let mut bytes = encode(&metadata, Some(self), reply, room);
        if let Some(edns) = self.edns {
            add_opt(&mut bytes, reply.code, edns.dnssec_ok);
        }
        bytes
    }

    /// The question as it is passed on to others.
    pub fn query(&self, id: u16) -> Vec<u8> {
        let mut message = Message::new(id, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.metadata.checking_disabled = self.metadata.checking_disabled;
        message.add_query(Query::query(self.name.clone(), self.kind));
        let mut edns = Edns::new();
        edns.set_max_payload(MAX_UDP);
        edns.set_dnssec_ok(self.edns.is_some_and(|edns| edns.dnssec_ok));
        message.set_edns(edns);
        // A name that was read can be written.
        message.to_vec().unwrap_or_default()
    }
}

fn encode(metadata: &Metadata, question: Option<&Question>, reply: &Reply, room: u16) -> Vec<u8> {
    let query = question.map(|question| Query::query(question.name.clone(), question.kind));
    let mut bytes = Vec::with_capacity(usize::from(PLAIN_UDP));
    let write = |bytes: &mut Vec<u8>, additionals: &[Record]| {
        bytes.clear();
        let mut encoder = BinEncoder::new(bytes);
        encoder.set_max_size(room);
        let header = emit_message_parts(
            metadata,
            &mut query.iter(),
            &mut reply.answers.iter(),
            &mut reply.authorities.iter(),
            &mut additionals.iter(),
            None,
            None,
            &mut encoder,
        );
        // What did not fit may have been begun.
        let written = encoder.offset();
        bytes.truncate(written);
        header.map(|header| header.truncation)
    };
    match write(&mut bytes, &reply.additionals) {
        // Without what only helps, nothing may be missing (RFC 2181, 9).
        Ok(true) if !reply.additionals.is_empty() => drop(write(&mut bytes, &[])),
        _ => {}
    }
    bytes
}

/// Writes an OPT record behind everything.
fn add_opt(bytes: &mut Vec<u8>, code: ResponseCode, dnssec_ok: bool) {
    let Some(count) = bytes
        .get(10..12)
        .map(|count| u16::from_be_bytes([count[0], count[1]]))
    else {
        return;
    };
    bytes[10..12].copy_from_slice(&(count + 1).to_be_bytes());
    bytes.push(0);
    bytes.extend(u16::from(RecordType::OPT).to_be_bytes());
    bytes.extend(MAX_UDP.to_be_bytes());
    // The upper half of the code, version 0, and DO as the client has it (RFC 3225, 3).
    bytes.extend([code.high(), 0, u8::from(dnssec_ok) << 7, 0]);
    bytes.extend(0_u16.to_be_bytes());
}
