use std::sync::{Mutex, PoisonError};

use dnd_mesh::Fault;
use dnd_proto::v1::Usage;
use tonic::Code;

use super::{LlmArgs, wire::Tokens};

const TOKENS_OF_A_PRICE: f64 = 1e6;

/// What was spent, and what may be.
pub(super) struct Spending {
    /// Of a million tokens of prompts, and of answers.
    prices: Option<(f64, f64)>,
    tokens: Option<u64>,
    cost: Option<f64>,
    spent: Mutex<Usage>,
}

impl Spending {
    pub(super) fn new(args: &LlmArgs) -> Self {
        Self { prices: args.llm_price_in.zip(args.llm_price_out), tokens: args.llm_budget, cost: args.llm_budget_cost, spent: Mutex::default() }
    }

    /// Whether anything may still be asked.
    pub(super) fn check(&self) -> Result<(), Fault> {
        let spent = *self.spent.lock().unwrap_or_else(PoisonError::into_inner);
        let reached = |budget: String| {
            let Usage { calls, prompt_tokens, answer_tokens, .. } = spent;
            let message = format!("the budget of {budget} is reached: {calls} answers took {prompt_tokens} tokens of prompts and {answer_tokens} of answers");
            Err(Fault::new(Code::ResourceExhausted, "LLM_BUDGET", message))
        };
        match (self.tokens, self.cost) {
            (Some(tokens), _) if spent.prompt_tokens + spent.answer_tokens >= tokens => reached(format!("{tokens} tokens")),
            (_, Some(cost)) if spent.cost.unwrap_or_default() >= cost => reached(cost.to_string()),
            _ => Ok(()),
        }
    }

    /// Counts an answer in; gives what it took. One that does not say what it took can't be held to a budget.
    pub(super) fn add(&self, tokens: Option<Tokens>) -> Result<Usage, Fault> {
        if tokens.is_none() && (self.tokens.is_some() || self.cost.is_some()) {
            let message = "the endpoint does not say how many tokens its answers take (`usage`), so no budget can be kept; leave it out to ask all the same";
            return Err(Fault::new(Code::ResourceExhausted, "LLM_BUDGET", message));
        }
        let Tokens { prompt_tokens, completion_tokens: answer_tokens } = tokens.unwrap_or_default();
        let cost = |(of_prompts, of_answers)| (prompt_tokens as f64 * of_prompts + answer_tokens as f64 * of_answers) / TOKENS_OF_A_PRICE;
        let usage = Usage { calls: 1, prompt_tokens, answer_tokens, cost: self.prices.map(cost) };
        self.spent.lock().unwrap_or_else(PoisonError::into_inner).add(&usage);
        Ok(usage)
    }
}
