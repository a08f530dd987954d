//! Step 2: candidate concept generation (3.2, A.1.2).

use dnd_method::{
    answers::{self, NO_CONCEPT, Reading},
    draw,
};
use dnd_proto::v1::Stage;

use super::{ActivatingImages, Course, Unit};
use crate::{calls::Said, failure::Failure};

impl<C: Course> Unit<'_, C> {
    /// Step 2A: a caption for each image of I. Gives those that there are; an image that can't be captioned is left out.
    pub(crate) async fn caption(&mut self, images: &ActivatingImages) -> Result<Vec<String>, Failure> {
        self.result.images = images.0.clone();
        let captions = self.timed(Stage::Caption, self.calls.captions(&images.digests())).await;
        let mut last = None;
        for (place, caption) in captions.into_iter().enumerate() {
            let Some(image) = self.result.images.get_mut(place) else { continue };
            match caption {
                Ok(text) if text.trim().is_empty() => {
                    let warning = format!("the caption of {} is empty", image.path);
                    self.warn(warning);
                }
                Ok(text) => image.caption = text,
                Err(failure) if failure.is_the_items => {
                    let warning = format!("{} was not captioned: {}", image.path, failure.message);
                    self.warn(warning);
                    last = Some(failure);
                }
                Err(failure) => return Err(failure),
            }
        }
        let captions: Vec<String> = self.result.images.iter().map(|image| image.caption.clone()).filter(|caption| !caption.is_empty()).collect();
        if captions.is_empty() {
            return Err(last.unwrap_or_else(|| Failure::new("no_caption", "all captions are empty")));
        }
        self.through(Stage::Caption).await?;
        Ok(captions)
    }

    /// Step 2B: the captions, simplified one by one, and N summaries of them, which make the candidate concepts T.
    pub(crate) async fn summarize(&mut self, captions: Vec<String>) -> Result<Vec<String>, Failure> {
        let descriptions = if self.calls.parameters().simplify { self.simplify(captions).await? } else { captions };
        for image in &mut self.result.images {
            if image.simplified.is_empty() {
                image.simplified.clone_from(&image.caption);
            }
        }
        let parameters = self.calls.parameters();
        let asked: Vec<(u32, Vec<String>)> = (0..parameters.candidates)
            .map(|n| {
                let mut descriptions = descriptions.clone();
                draw::shuffle(&mut descriptions, parameters.seed, &self.result.layer, self.result.unit, n);
                (n, descriptions)
            })
            .collect();
        let (said, usage) = self.timed(Stage::Summarize, self.calls.summaries(asked, false)).await;
        self.used(Stage::Summarize, usage);

        // An answer that is a list is asked about once more.
        let mut concepts = vec![String::new(); said.len()];
        let mut again = Vec::new();
        let mut last = None;
        for (n, said) in (0..).zip(said) {
            match said {
                Ok(Said::Text(answer)) => {
                    match answers::read(&answer) {
                        Reading::Concept(concept) => concepts[n as usize] = concept,
                        Reading::AskAgain(parts) => again.push((n, parts)),
                    }
                    self.result.answers.push(answer);
                }
                Ok(Said::Unusable(why)) => self.warn(format!("summary {n} failed: {why}")),
                Err(failure) if failure.is_the_items => {
                    self.warn(format!("summary {n} failed: {}", failure.message));
                    last = Some(failure);
                }
                Err(failure) => return Err(failure),
            }
        }
        let numbers: Vec<u32> = again.iter().map(|(n, _)| *n).collect();
        let (said, usage) = if again.is_empty() { (Vec::new(), None) } else { self.timed(Stage::Summarize, self.calls.summaries(again, true)).await };
        self.used(Stage::Summarize, usage);
        for (n, said) in numbers.into_iter().zip(said) {
            match said {
                Ok(Said::Text(answer)) => {
                    concepts[n as usize] = answers::read_again(&answer);
                    self.result.answers.push(answer);
                }
                Ok(Said::Unusable(why)) => self.warn(format!("summary {n} failed when it was asked about again: {why}")),
                Err(failure) if failure.is_the_items => {
                    self.warn(format!("summary {n} failed when it was asked about again: {}", failure.message));
                    last = Some(failure);
                }
                Err(failure) => return Err(failure),
            }
        }
        let candidates = answers::candidates(&concepts).map_err(|e| last.unwrap_or_else(|| Failure::new(NO_CONCEPT, e.to_string()).worth_another_try()))?;
        self.through(Stage::Summarize).await?;
        Ok(candidates)
    }

    /// Each caption by prompt 1; one that can't be asked about, or about which nothing usable is said, stays as it is.
    async fn simplify(&mut self, captions: Vec<String>) -> Result<Vec<String>, Failure> {
        let (simplified, usage) = self.timed(Stage::Summarize, self.calls.simplified(&captions)).await;
        self.used(Stage::Summarize, usage);
        let mut descriptions = Vec::with_capacity(captions.len());
        for (caption, simplified) in captions.into_iter().zip(simplified) {
            let description = match simplified {
                Ok(Said::Text(text)) => text.trim().to_owned(),
                Ok(Said::Unusable(why)) => {
                    self.warn(format!("{caption:?} was not simplified, and is used as it is: {why}"));
                    caption.clone()
                }
                Err(failure) if failure.is_the_items => {
                    self.warn(format!("{caption:?} was not simplified, and is used as it is: {}", failure.message));
                    caption.clone()
                }
                Err(failure) => return Err(failure),
            };
            for image in self.result.images.iter_mut().filter(|image| image.caption == caption) {
                image.simplified.clone_from(&description);
            }
            descriptions.push(description);
        }
        Ok(descriptions)
    }
}
