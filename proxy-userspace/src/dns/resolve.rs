//! From a question to an answer: from the zone, or from others.

use std::rc::Rc;

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{Name, Record},
};

use super::{
    forward::Forwarder,
    metrics::Metrics,
    wire::{Question, Reply},
    zone::{Answer, Zone},
};

/// Answers questions.
#[derive(Debug)]
pub struct Resolver {
    zone: Zone,
    /// Those who know other names.
    forwarder: Rc<Forwarder>,
    metrics: Metrics,
}

/// An answer, at once or later.
#[derive(Debug)]
pub enum Response {
    /// The zone knows, or the cache.
    Now(Reply),
    /// Others must be asked.
    Later(Asked),
}

/// What others are asked.
#[derive(Debug)]
pub struct Asked {
    /// CNAMEs that led there.
    chain: Vec<Record>,
    name: Name,
}

impl Resolver {
    /// Over a zone, and others that know more.
    pub fn new(zone: Zone, forwarder: Rc<Forwarder>, metrics: Metrics) -> Self {
        Self {
            zone,
            forwarder,
            metrics,
        }
    }

    /// What is counted.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Answers a question, or says that others must be asked.
    pub fn resolve(&self, question: &Question) -> Response {
        Response::Now(match self.zone.answer(&question.name, question.kind) {
            Answer::Records {
                answers,
                additionals,
            } => Reply {
                authoritative: true,
                answers,
                additionals,
                ..self.reply(ResponseCode::NoError)
            },
            Answer::NoData(chain) => self.negative(ResponseCode::NoError, question, chain),
            Answer::NoName(chain) => self.negative(ResponseCode::NXDomain, question, chain),
            Answer::NotReady | Answer::Loop => self.reply(ResponseCode::ServFail),
            Answer::Elsewhere(_, name) if self.forwarder.is_own(&name) => {
                self.reply(ResponseCode::NXDomain)
            }
            Answer::Elsewhere(chain, name) => match self.forwarder.cached(question, &name) {
                Some(message) => self.passed_on(chain, &message),
                // There is nobody to ask.
                None if !self.forwarder.has_servers() => Reply {
                    answers: chain,
                    ..self.reply(ResponseCode::Refused)
                },
                None => return Response::Later(Asked { chain, name }),
            },
        })
    }

    fn reply(&self, code: ResponseCode) -> Reply {
        Reply {
            code,
            recursion_available: self.forwarder.has_servers(),
            ..Reply::default()
        }
    }

    fn negative(&self, code: ResponseCode, question: &Question, chain: Vec<Record>) -> Reply {
        let asked = chain.last().map_or(&question.name, |record| &record.name);
        Reply {
            authoritative: true,
            authorities: vec![self.zone.soa(asked)],
            answers: chain,
            ..self.reply(code)
        }
    }

    /// What others have answered, behind the CNAMEs that led to them.
    fn passed_on(&self, chain: Vec<Record>, message: &Message) -> Reply {
        Reply {
            // The first name is ours.
            authoritative: !chain.is_empty(),
            authentic_data: chain.is_empty() && message.metadata.authentic_data,
            answers: chain
                .into_iter()
                .chain(message.answers.iter().cloned())
                .collect(),
            authorities: message.authorities.clone(),
            ..self.reply(message.metadata.response_code)
        }
    }
}

impl Asked {
    /// Waits for the answer.
    pub async fn wait(self, resolver: &Resolver, question: &Question) -> Reply {
        match resolver.forwarder.ask(question, &self.name).await {
            Some(message) => resolver.passed_on(self.chain, &message),
            None => resolver.reply(ResponseCode::ServFail),
        }
    }
}
